"""The state of an optimizer as rows that describe themselves, whichever optimizer it is."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer, MixedPrecisionOptimizer
from torch import Tensor
from torch.nn import Parameter

from megatron_7b import upstream
from megatron_7b.optim.held import held_parameters

if TYPE_CHECKING:
    from megatron_7b.optim.optimizer import Optimizer

MAIN = "param"
"""Kind of the FP32 main parameters, of which the working ones are a copy in a narrower format."""


@dataclass(frozen=True)
class StateRow:
    """One tensor of the state of one parameter on this rank.

    Attributes:
        parameter: Of the model.
        kind: What it is to the optimizer: `MAIN`, or the optimizer's own name for it, such as `exp_avg`.
        tensor: A range of elements of the flattened parameter, in any shape.
        start: Where the range begins.
        is_share: The range is this rank's alone; otherwise all data-parallel ranks hold the same.
    """

    parameter: Parameter
    kind: str
    tensor: Tensor
    start: int
    is_share: bool


def state_rows(optimizer: "Optimizer") -> Iterator[StateRow]:
    """Yield the state of this rank's trainable parameters.

    It consists of main parameters where the working ones are narrower, and of whatever the optimizer keeps. The tensors
    are the optimizer's own, or copies if it keeps them in a narrower format: `take_over` hands them back.

    Collective: none.
    """
    for part in optimizer.parts:
        # Transformer Engine's state may not exist before the first update.
        if part.init_state_fn is not None and not any(part.optimizer.state.values()):
            part.init_state_fn(part.optimizer, part.config)
        for held in held_parameters(part):
            for kind, tensor in _tensors(part, held.parameter, held.main).items():
                if kind != MAIN or held.parameter.dtype != torch.float32:
                    yield StateRow(held.parameter, kind, tensor, held.start, held.is_share)


@torch.no_grad()
def take_over(optimizer: "Optimizer", rows: Sequence[StateRow]) -> None:
    """Hand the filled tensors of rows to the optimizer that they are copies of.

    Collective: none.
    """
    by_parameter: dict[Parameter, dict[str, Tensor]] = {}
    for row in rows:
        by_parameter.setdefault(row.parameter, {})[row.kind] = row.tensor
    for part in optimizer.parts:
        if _keeps_copies(part):
            for held in held_parameters(part):
                tensors = _tensors(part, held.parameter, held.main) | by_parameter.get(held.parameter, {})
                upstream.set_main_and_states(part, held.parameter, tensors)


def renew_main_parameters(optimizer: "Optimizer") -> None:
    """Set the main parameters to the working ones. Collective: none."""
    for part in optimizer.parts:
        if part.optimizer is not None:
            part.reload_model_params()


@torch.no_grad()
def round_main_parameters(optimizer: "Optimizer") -> None:
    """Round the main parameters into the working ones.

    Collective: all ranks.
    """
    for part in optimizer.parts:
        if isinstance(part, MixedPrecisionOptimizer):
            upstream.round_main_parameters(part)
        if isinstance(part, DistributedOptimizer):
            for chunk in part.model_chunks:
                chunk.start_param_sync(force_sync=True)  # an FP8 scale belongs to all shares of a parameter


def _tensors(part: MegatronOptimizer, parameter: Parameter, main: Tensor) -> dict[str, Tensor]:
    if _keeps_copies(part):
        return upstream.main_and_states(part, parameter)
    state: dict[str, Any] = part.optimizer.state[main]
    of_elements = {kind: one for kind, one in state.items() if isinstance(one, Tensor) and one.shape == main.shape}
    return {MAIN: main.detach(), **of_elements}


def _keeps_copies(part: MegatronOptimizer) -> bool:
    """Whether Transformer Engine keeps the state in a narrower format, and hands out and takes FP32 copies."""
    return bool(part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8) and isinstance(part, DistributedOptimizer)
