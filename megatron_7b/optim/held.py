"""What of each parameter megatron-core's optimizers update on this rank, and in which tensor."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, MegatronOptimizer
from torch import Tensor
from torch.nn import Parameter

from megatron_7b import upstream


@dataclass(frozen=True)
class Held:
    """The part of a parameter that an optimizer updates on this rank.

    Attributes:
        parameter: Of the model.
        main: What the optimizer updates: the parameter itself, an FP32 copy of it, or a range of either.
        start: Where `main` begins in the flattened parameter.
        is_share: It is this rank's alone; otherwise all data-parallel ranks hold the same.
    """

    parameter: Parameter
    main: Tensor
    start: int
    is_share: bool


def held_parameters(part: MegatronOptimizer) -> Iterator[Held]:
    """Yield what one of megatron-core's optimizers holds; frozen parameters are not among them.

    Collective: none.
    """
    if part.optimizer is None:  # nothing is trained
        return
    if isinstance(part, DistributedOptimizer):
        for parameter, (group, position) in part.model_param_group_index_map.items():
            start = upstream.owned_range(part, parameter).start
            yield Held(parameter, part.optimizer.param_groups[group]["params"][position], start, is_share=True)
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        for mains, workings in zip(part.fp32_from_float16_groups, part.float16_groups, strict=True):
            for main, parameter in zip(mains, workings, strict=True):
                yield Held(parameter, main, 0, is_share=False)
        for group in part.fp32_from_fp32_groups:
            for parameter in group:
                yield Held(parameter, parameter, 0, is_share=False)
    else:
        for group in part.param_groups:
            for parameter in group["params"]:
                yield Held(parameter, parameter, 0, is_share=False)


def without_parameters(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return parameter groups to build an optimizer from; `take_parameters` then fills them.

    torch's constructors refuse the ranges of parameters that megatron-core's distributed optimizer updates.
    """
    return [{**group, "params": []} for group in groups]


def take_parameters(optimizer: torch.optim.Optimizer, groups: Sequence[dict[str, Any]]) -> None:
    """Let an optimizer that was built from `without_parameters(groups)` update the parameters of these groups."""
    for own, group in zip(optimizer.param_groups, groups, strict=True):
        own["params"] = group["params"]
