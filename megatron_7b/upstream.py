"""The private names of torch and megatron-core that this package uses, each with its reason: what an upgrade may break.

Checked with torch 2.14.1 and megatron-core 0.19.2; `tests/test_upstream.py` has a test for each name. What
replaces names of `torch.cuda` on a CPU is listed in `runtime/cpu/backend.py` instead, and tested as completely.
"""

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.nn import Parameter

OVERRIDDEN = {"TransformerLayer": ("_forward_attention", "_forward_mlp")}
"""megatron-core: methods that `model.kinds.encoder` overrides, because a layer has no place for a norm after them."""


def stored_at(file: str, start: int, length: int) -> Any:
    """Return the entry of torch's index of a checkpoint that says where a piece is.

    torch: `filesystem._StorageInfo`. It is part of the format; torch's own writer, which makes it, holds all tensors of
    a plan until it returns, and knows no hash of its files.

    Args:
        file: Name in the folder.
        start: First byte.
        length: Number of bytes.
    """
    return filesystem._StorageInfo(file, start, length)


def forward_pre_hooks(module: torch.nn.Module) -> list[Callable[..., object]]:
    """Return what a module's forward would call first.

    torch: `Module._forward_pre_hooks`. Where a weight is used without calling the forward, what waits there for the
    weight has to be called; torch has no public list of hooks.
    """
    return list(module._forward_pre_hooks.values())


def assert_on_device(condition: torch.Tensor, message: str) -> None:
    """Stop if a condition does not hold, without waiting for the device that computes it.

    torch: `_assert_async`. A CPU says so at once, by a RuntimeError; a GPU when the host next waits for it.
    """
    torch._assert_async(condition, message)


def created_groups(parallel_state: ModuleType) -> list[Any]:
    """Return the process groups that megatron-core has created and not destroyed.

    megatron-core: `parallel_state._global_process_group_list`. Its `destroy_model_parallel` forgets them instead.

    Args:
        parallel_state: The module, which only `parallel` may import.
    """
    return [group for group in parallel_state._global_process_group_list or [] if group is not None]


def known_layout(parallel_state: ModuleType) -> dict[str, Any]:
    """Return all that megatron-core knows of a layout: groups, ranks and sizes, by the names of its globals.

    megatron-core: the globals of `parallel_state` in capitals. It knows one layout at a time, and asks them as it runs.

    Args:
        parallel_state: The module, which only `parallel` may import.
    """
    return {name: value for name, value in vars(parallel_state).items() if name.startswith("_") and name.isupper()}


def know_layout(parallel_state: ModuleType, layout: dict[str, Any]) -> None:
    """Have megatron-core know a layout that `known_layout` has returned, and no other."""
    vars(parallel_state).update(layout)


def add_created_groups(parallel_state: ModuleType, groups: list[Any]) -> None:
    """Count groups among those that megatron-core has created and not destroyed; see `created_groups`."""
    parallel_state._global_process_group_list = [*groups, *created_groups(parallel_state)]  # type: ignore[attr-defined]


@contextlib.contextmanager
def one_group_for_equal_ranks(parallel_state: ModuleType, overlapping: frozenset[str]) -> Iterator[None]:
    """Have megatron-core make one process group for each set of ranks within a with block, whatever it is for.

    megatron-core: `parallel_state.create_group`. Its `initialize_model_parallel` makes a group for each purpose, some
    twenty, of which most have the same ranks. With NCCL each that is used takes device memory of its own.

    Args:
        parallel_state: The module, which only `parallel` may import.
        overlapping: Purposes, by the descriptions of megatron-core, of the groups that share among themselves only.
    """
    original: Callable[..., Any] = parallel_state.create_group
    everyone = tuple(range(dist.get_world_size()))
    made: dict[tuple[object, ...], Any] = {}

    def create(ranks: list[int], **options: Any) -> Any:
        members, is_apart = tuple(sorted(ranks)), len(ranks) > 1 and options.get("group_desc") in overlapping
        if members == everyone and not is_apart and options.get("backend") is None:
            return dist.group.WORLD
        key = members, is_apart, options.get("backend")
        if key not in made:
            made[key] = original(ranks, **options)
        return made[key]

    parallel_state.create_group = create  # type: ignore[attr-defined]
    try:
        yield
    finally:
        parallel_state.create_group = original  # type: ignore[attr-defined]


def let_layers_be_graphs() -> None:
    """Let megatron-core capture layers of HybridModel that are nothing but an MLP as CUDA graphs.

    megatron-core: `is_moe_layer`, which the capture asks `ssm.mlp_layer.MLPLayer` for before its constructor sets it.
    Seen on a GPU with 0.19.2.
    """
    from megatron.core.ssm.mlp_layer import MLPLayer

    MLPLayer.is_moe_layer = False


def stretched_frequencies(rotary: Any, **scaling: float) -> Tensor:
    """Return the inverse frequencies of a rotary embedding as Llama 3.1 scales them.

    megatron-core: `RotaryEmbedding._apply_scaling`. Its constructor calls it with fixed frequencies only, and
    HybridModel's does not pass them on.
    """
    return cast(Tensor, rotary._apply_scaling(rotary.inv_freq, **scaling))


@contextlib.contextmanager
def final_norm(norm: type) -> Iterator[None]:
    """Have megatron-core's HybridStack build its final norm from `norm` within a with block.

    megatron-core: the name `TENorm` in `models.hybrid.hybrid_block`, which is hard-wired there and is None without
    Transformer Engine.
    """
    from megatron.core.models.hybrid import hybrid_block

    original = hybrid_block.TENorm
    hybrid_block.TENorm = norm
    try:
        yield
    finally:
        hybrid_block.TENorm = original


def owned_range(optimizer: Any, parameter: Parameter) -> Any:
    """Return the range of a flattened parameter that this rank updates, with `start` and `end`.

    megatron-core: `DistributedOptimizer._get_model_param_range_map`.
    """
    return optimizer._get_model_param_range_map(parameter)["param"]


def main_and_states(optimizer: Any, parameter: Parameter) -> dict[str, Tensor]:
    """Return this rank's part of a parameter's FP32 main parameter (`param`) and of its optimizer state, by name.

    megatron-core: `DistributedOptimizer._get_main_param_and_optimizer_states`. Its public `sharded_state_dict` gathers
    all parts on every rank, or divides them in a form that only the same layout reads.
    """
    return cast(dict[str, Tensor], optimizer._get_main_param_and_optimizer_states(parameter))


def set_main_and_states(optimizer: Any, parameter: Parameter, tensors: dict[str, Tensor]) -> None:
    """Replace what `main_and_states` returns.

    megatron-core: `DistributedOptimizer._set_main_param_and_optimizer_states`.
    """
    optimizer._set_main_param_and_optimizer_states(parameter, tensors)


def round_main_parameters(optimizer: Any) -> None:
    """Write an optimizer's FP32 main parameters, rounded, to the parameters of the model.

    megatron-core: `MixedPrecisionOptimizer._copy_main_params_to_model_params`. Its public way is a whole step.
    """
    optimizer._copy_main_params_to_model_params()
