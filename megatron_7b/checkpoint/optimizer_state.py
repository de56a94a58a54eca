"""The optimizer's state in a checkpoint: whatever the optimizer says it keeps, as rows of `megatron_7b.optim.state`.

Every rank writes its own share and reads what it needs. With the distributed optimizer, the share consists of ranges of
the flattened parameters; otherwise it is an equal part, in the same form, of what all replicas hold. So either kind of
optimizer loads the other's state, at any layout, and no rank ever holds more than its own part.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from torch.nn import Parameter

from megatron_7b.checkpoint.pieces import Piece, cut
from megatron_7b.checkpoint.sharding import Sharded, blocks, replica_of
from megatron_7b.checkpoint.stored import StoredTensors
from megatron_7b.errors import CheckpointError
from megatron_7b.optim.optimizer import Optimizer
from megatron_7b.optim.state import MAIN, state_rows, take_over

_PREFIX = "optimizer.state"


class OptimizerShare:
    """The part of the state that this rank writes; the shares of all ranks are disjoint and complete.

    Args:
        optimizer: Of this rank; its tensors are referred to, not copied.
        model: What `sharding.model_state` gave.

    Attributes:
        pieces: To be written; views of the optimizer's tensors.
    """

    def __init__(self, optimizer: Optimizer, model: dict[str, Any]) -> None:
        entries = _Entries(model)
        self.pieces: list[Piece] = []
        for row in state_rows(optimizer):
            entry = entries[row.parameter]
            *copies, _ = entry.replica_id
            if any(copies):  # another tensor-parallel rank or stage has the same parameter
                continue
            flat, start = row.tensor.view(-1), row.start
            if not row.is_share:
                replica = replica_of(entry.key)
                start, stop = (flat.numel() * i // replica.total for i in (replica.number, replica.number + 1))
                flat = flat[start:stop]
            self.pieces += cut(f"{_PREFIX}.{row.kind}.{entry.key}", blocks(entry), start, flat)


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
        name = f"{_PREFIX}.{MAIN}.{piece.name}"
        if state is not None and name in state.tensors:
            main.append(replace(piece, name=name))
        else:
            weights.append(piece)
    stored.read(weights)
    if state is not None:
        state.read(main)


@torch.no_grad()
def read_optimizer(
    stored: StoredTensors, state: StoredTensors | None, optimizer: Optimizer, model: dict[str, Any], *, only_main: bool
) -> None:
    """Read the FP32 main parameters and what the optimizer keeps beside them, whatever layout has written them.

    Where the checkpoint has no main parameters, its weights take their place.

    Args:
        stored: The checkpoint.
        state: Its optimizer state, if it has any.
        optimizer: Of this rank.
        model: What `sharding.model_state` gave; the state of parameters that are not in it stays as it is.
        only_main: Read the main parameters; the rest stays as it is.

    Raises:
        CheckpointError: State is missing, or a file cannot be read.
    """
    entries = _Entries(model)
    rows = [row for row in state_rows(optimizer) if row.parameter in entries and (row.kind == MAIN or not only_main)]
    of_main: list[Piece] = []
    others: list[Piece] = []
    for row in rows:
        entry = entries[row.parameter]
        is_main = row.kind == MAIN
        name = entry.key if is_main else f"{_PREFIX}.{row.kind}.{entry.key}"
        (of_main if is_main else others).extend(cut(name, blocks(entry), row.start, row.tensor.view(-1)))
    read_weights_in_full(stored, state, of_main)
    if others:
        assert state is not None
        missing = sorted({piece.name for piece in others} - state.tensors.keys())
        if missing:
            raise CheckpointError(f"optimizer state is missing for {len(missing)} tensors: {', '.join(missing[:8])}")
        state.read(others)
    take_over(optimizer, rows)


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
