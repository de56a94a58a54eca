"""The optimizer's state in a checkpoint: Adam's moments, and FP32 main parameters where the working ones are narrower.

Every rank writes its own share and reads what it needs. With the distributed optimizer, the share consists of ranges of
the flattened parameters; otherwise it is an equal part, in the same form, of what all replicas hold. So either kind of
optimizer loads the other's state, at any layout, and no rank ever holds more than its own part.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    Float16OptimizerWithFloat16Params,
    MegatronOptimizer,
    MixedPrecisionOptimizer,
)
from torch import Tensor
from torch.nn import Parameter

from megatron_7b import upstream
from megatron_7b.checkpoint.pieces import Piece, cut
from megatron_7b.checkpoint.sharding import Sharded, blocks
from megatron_7b.checkpoint.stored import StoredTensors
from megatron_7b.errors import CheckpointError
from megatron_7b.optim.optimizer import Optimizer

_PREFIX = "optimizer.state"
_MAIN = "param"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Row:
    """A parameter's state on this rank.

    Attributes:
        parameter: Of the model.
        part: The optimizer that updates it.
        start: Where the tensors begin in the flattened parameter; they are all of one length.
        tensors: By kind, in the shape that the optimizer keeps; the main parameter only where it is not the model's.
        is_share: They are this rank's alone; otherwise all data-parallel ranks hold the same.
    """

    parameter: Parameter
    part: MegatronOptimizer
    start: int
    tensors: dict[str, Tensor]
    is_share: bool


class OptimizerShare:
    """The part of the state that this rank writes; the shares of all ranks are disjoint and complete.

    Args:
        optimizer: Of this rank; its tensors are referred to, not copied.
        model: What `sharding.model_state` gave.
        replica: This rank's place among the ranks that hold the same part of the model.
        num_replicas: How many they are.

    Attributes:
        pieces: To be written; views of the optimizer's tensors.
    """

    def __init__(self, optimizer: Optimizer, model: dict[str, Any], replica: int, num_replicas: int) -> None:
        entries = _Entries(model)
        self.pieces: list[Piece] = []
        for row in _rows(optimizer):
            entry = entries[row.parameter]
            *copies, _ = entry.replica_id
            if any(copies):  # another tensor-parallel rank or stage has the same parameter
                continue
            for kind, tensor in row.tensors.items():
                flat, start = tensor.view(-1), row.start
                if not row.is_share:
                    start, stop = (flat.numel() * i // num_replicas for i in (replica, replica + 1))
                    flat = flat[start:stop]
                self.pieces += cut(f"{_PREFIX}.{kind}.{entry.key}", blocks(entry), start, flat)


@torch.no_grad()
def read_weights_in_full(stored: StoredTensors, state: StoredTensors | None, pieces: Iterable[Piece]) -> None:
    """Fill FP32 pieces of parameters with all digits that a checkpoint has.

    The weights of a run in a narrower format are rounded; its FP32 main parameters are not.

    Args:
        stored: The checkpoint.
        state: Its optimizer state, if it has any.
        pieces: To be filled, under the names of the parameters.

    Raises:
        CheckpointError: A parameter is not there, or a file cannot be read.
    """
    weights, main = [], []
    for piece in pieces:
        name = f"{_PREFIX}.{_MAIN}.{piece.name}"
        if state is not None and name in state.tensors:
            main.append(replace(piece, name=name))
        else:
            weights.append(piece)
    stored.read(weights)
    if state is not None:
        state.read(main)


@torch.no_grad()
def read_optimizer(
    stored: StoredTensors, state: StoredTensors | None, optimizer: Optimizer, model: dict[str, Any], *, moments: bool
) -> None:
    """Read the FP32 main parameters, and Adam's moments, whatever layout or kind of optimizer has written them.

    Where the checkpoint has no main parameters, its weights take their place.

    Args:
        stored: The checkpoint.
        state: Its optimizer state, if it has any.
        optimizer: Of this rank.
        model: What `sharding.model_state` gave; the state of parameters that are not in it stays as it is.
        moments: Read them as well; otherwise they stay as they are.

    Raises:
        CheckpointError: State is missing, or a file cannot be read.
    """
    entries = _Entries(model)
    rows = [row for row in _rows(optimizer) if row.parameter in entries]
    of_main: list[Piece] = []
    of_moments: list[Piece] = []
    for row in rows:
        entry = entries[row.parameter]
        for kind, tensor in row.tensors.items():
            name = entry.key if kind == _MAIN else f"{_PREFIX}.{kind}.{entry.key}"
            pieces = cut(name, blocks(entry), row.start, tensor.view(-1))
            (of_main if kind == _MAIN else of_moments).extend(pieces)
    read_weights_in_full(stored, state, of_main)
    if moments:
        assert state is not None
        missing = sorted({piece.name for piece in of_moments} - state.tensors.keys())
        if missing:
            raise CheckpointError(f"optimizer state is missing for {len(missing)} tensors: {', '.join(missing[:8])}")
        state.read(of_moments)
    _keep(rows)


@torch.no_grad()
def take_over_main_parameters(optimizer: Optimizer) -> None:
    """Round the main parameters that were read into the working ones.

    Collective: all ranks.
    """
    for part in optimizer.parts:
        if isinstance(part, MixedPrecisionOptimizer):
            upstream.round_main_parameters(part)
        if isinstance(part, DistributedOptimizer):
            for chunk in part.model_chunks:
                chunk.start_param_sync(force_sync=True)  # an FP8 scale belongs to all shares of a parameter


def set_num_updates(optimizer: Optimizer, num_updates: int) -> None:
    """Set how many updates Adam has done: torch keeps it per parameter, Transformer Engine and apex per group."""
    for part in optimizer.parts:
        adam = part.optimizer
        if isinstance(adam, torch.optim.AdamW):
            for parameter, state in adam.state.items():
                state["step"] = torch.tensor(float(num_updates), device=parameter.device)
        else:
            for group in adam.param_groups:
                group["step"] = num_updates


def _keep(rows: Sequence[_Row]) -> None:
    """Hand filled tensors to the optimizer, where they are copies because it keeps its state in a narrower type."""
    for row in rows:
        if isinstance(row.part, DistributedOptimizer):
            held = upstream.main_and_states(row.part, row.parameter)
            upstream.set_main_and_states(row.part, row.parameter, held | row.tensors)


def _rows(optimizer: Optimizer) -> Iterator[_Row]:
    for part in optimizer.parts:
        # Adam's state may not exist before the first update.
        if part.init_state_fn is not None and not any(part.optimizer.state.values()):
            part.init_state_fn(part.optimizer, part.config)
        yield from _ranges(part) if isinstance(part, DistributedOptimizer) else _whole(part)


def _ranges(part: DistributedOptimizer) -> Iterator[_Row]:
    """The ranges of flattened parameters that this data-parallel rank updates."""
    for parameter in part.model_param_group_index_map:
        owned = upstream.owned_range(part, parameter)
        tensors = upstream.main_and_states(part, parameter)
        kinds = _MOMENTS if parameter.dtype == torch.float32 else (_MAIN, *_MOMENTS)
        yield _Row(parameter, part, owned.start, {kind: tensors[kind] for kind in kinds}, is_share=True)


def _whole(part: MegatronOptimizer) -> Iterator[_Row]:
    for main, parameter in _main_and_working(part):
        tensors = {kind: part.optimizer.state[main][kind] for kind in _MOMENTS}
        if main is not parameter:
            tensors[_MAIN] = main.detach()
        yield _Row(parameter, part, 0, tensors, is_share=False)


def _main_and_working(part: MegatronOptimizer) -> Iterator[tuple[Tensor, Parameter]]:
    """Yield (tensor that Adam updates, parameter of the model) of an optimizer that is not distributed."""
    if isinstance(part, Float16OptimizerWithFloat16Params):
        for mains, workings in zip(part.fp32_from_float16_groups, part.float16_groups, strict=True):
            yield from zip(mains, workings, strict=True)
        for group in part.fp32_from_fp32_groups:
            yield from zip(group, group, strict=True)
    else:
        for group in part.optimizer.param_groups:
            yield from zip(group["params"], group["params"], strict=True)


class _Entries:
    """Entries by parameter; megatron-core hands out either the parameter itself or its data."""

    def __init__(self, model: dict[str, Any]) -> None:
        entries: list[Sharded] = list(nested_values(model))
        self._by_identity = {id(entry.data): entry for entry in entries}
        self._by_address = {entry.data.data_ptr(): entry for entry in entries}

    def __contains__(self, parameter: Parameter) -> bool:
        return id(parameter) in self._by_identity or parameter.data_ptr() in self._by_address

    def __getitem__(self, parameter: Parameter) -> Sharded:
        return self._by_identity.get(id(parameter)) or self._by_address[parameter.data_ptr()]
