"""Whole matrices out of the parts that ranks hold, for updates that no rank can compute from its part alone.

The ranks of a pipeline stage divide the matrices of their layers among themselves. In each round everyone gets the
parts of one matrix, computes what is to be made of it, and gives each holder its part of the result. How a matrix is
distributed, over tensor-parallel ranks and as ranges over data-parallel ones, decides about these transfers only.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_7b.model.initialization import shard_ranges
from megatron_7b.model.parameters import Parameter


@dataclass(frozen=True)
class MatrixPart:
    """What a rank holds of a matrix: a range of a flattened tensor-parallel shard.

    Attributes:
        name: Of the whole.
        shard: Which shard; 0 for a matrix that every tensor rank holds whole.
        start: First element of the range in the shard.
        stop: One past the last.
    """

    name: str
    shard: int
    start: int
    stop: int


@dataclass(frozen=True)
class _Task:
    """One matrix of a round.

    Attributes:
        row: The whole.
        sources: By rank of the group, what it sends to the one that computes; together they are the whole.
        holders: By rank of the group, what it holds.
    """

    row: Parameter
    sources: Sequence[MatrixPart | None]
    holders: Sequence[MatrixPart | None]


class MatrixExchange:
    """Applies a function to whole matrices of which the ranks of a group hold parts.

    Args:
        rows: The matrices, whole: all that the group holds, on every rank.
        parts: What this rank holds of them.
        tp_size: Number of tensor-parallel shards.
        group: The ranks of this pipeline stage.
        device: Of the parts.

    Collective: the group.
    """

    def __init__(
        self,
        rows: Sequence[Parameter],
        parts: Sequence[MatrixPart],
        *,
        tp_size: int,
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        self._tp_size, self._group, self._device = tp_size, group, device
        self._rank, self._size = group.rank(), group.size()
        of_ranks: list[Sequence[MatrixPart]] = [[]] * self._size
        dist.all_gather_object(of_ranks, parts, group=group)
        held = [{part.name: part for part in of_rank} for of_rank in of_ranks]
        # Those that cost alike are in one round: a step is as slow as the slowest rank of each.
        ordered = sorted(rows, key=lambda row: (-math.prod(row.shape) * min(row.shape), row.name))
        self._rounds = [
            [self._task(row, owner, held) for owner, row in enumerate(ordered[first : first + self._size])]
            for first in range(0, len(ordered), self._size)
        ]

    def _task(self, row: Parameter, owner: int, held: Sequence[Mapping[str, MatrixPart]]) -> _Task:
        holders = [of_rank.get(row.name) for of_rank in held]
        ranks: dict[MatrixPart, list[int]] = {}
        for rank, part in enumerate(holders):
            if part is not None:
                ranks.setdefault(part, []).append(rank)
        sources: list[MatrixPart | None] = [None] * self._size
        for part, candidates in ranks.items():  # replicas hold the same: one of them sends it
            sources[owner if owner in candidates else candidates[owner % len(candidates)]] = part
        found = sum(_sizes(sources))
        assert found == math.prod(row.shape), f"the parts of {row.name} are {found} elements, not {row.shape}"
        return _Task(row, sources, holders)

    def apply(
        self, function: Callable[[Parameter, Tensor], Tensor], tensors: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Compute a function of each whole matrix, on one rank of the group.

        Args:
            function: From a matrix [rows, columns] to one of the same shape.
            tensors: This rank's parts by name, flat.

        Yields:
            Name and this rank's part of the result, flat.

        Collective: the group; every rank must exhaust the iterator.
        """
        for tasks in self._rounds:  # the task of rank i is the i-th
            own = tasks[self._rank] if self._rank < len(tasks) else None
            to_owners = {owner: tensors[task.row.name] for owner, task in enumerate(tasks) if task.sources[self._rank]}
            received = self._exchange(to_owners, _sizes(own.sources if own else []))
            to_holders = self._compute(own, function, received) if own else {}
            expected = [task.holders[self._rank] for task in tasks]
            results = self._exchange(to_holders, _sizes(expected))
            yield from ((task.row.name, results[owner]) for owner, task in enumerate(tasks) if expected[owner])

    def _compute(
        self, task: _Task, function: Callable[[Parameter, Tensor], Tensor], received: Sequence[Tensor]
    ) -> dict[int, Tensor]:
        """Return the parts of the result by the rank that they are for."""
        row = task.row
        num_shards = self._tp_size if row.tp_dim is not None else 1
        shards = torch.empty(num_shards, math.prod(row.shape) // num_shards, device=self._device)
        for part, values in zip(task.sources, received, strict=True):
            if part is not None:
                shards[part.shard, part.start : part.stop] = values
        results = _divided(row, function(row, _joined(row, shards)), num_shards)
        return {
            rank: results[part.shard][part.start : part.stop]
            for rank, part in enumerate(task.holders)
            if part is not None
        }

    def _exchange(self, outgoing: Mapping[int, Tensor], incoming: Sequence[int]) -> list[Tensor]:
        """Send a tensor to each of some ranks, and return what each rank has sent here.

        Args:
            outgoing: By rank.
            incoming: Elements to expect of the ranks, in order; of those that are not listed none.
        """
        nothing = torch.empty(0, device=self._device)
        if self._size == 1:
            return [outgoing.get(0, nothing)]
        sizes = [*incoming, *[0] * (self._size - len(incoming))]
        sent = [outgoing.get(rank, nothing) for rank in range(self._size)]
        received = torch.empty(sum(sizes), device=self._device)
        dist.all_to_all_single(received, torch.cat(sent), sizes, [one.numel() for one in sent], group=self._group)
        return list(torch.split(received, sizes))


def _sizes(parts: Sequence[MatrixPart | None]) -> list[int]:
    return [part.stop - part.start if part is not None else 0 for part in parts]


def _joined(row: Parameter, shards: Tensor) -> Tensor:
    """Return the matrix [rows, columns] whose flattened shards are given, [shards, elements]."""
    rows, columns = row.shape
    if len(shards) == 1:
        return shards.view(rows, columns)
    if row.tp_dim == 1:
        return torch.cat([shard.view(rows, -1) for shard in shards], dim=1)
    whole = torch.empty(rows, columns, device=shards.device)
    for number, shard in enumerate(shards):
        own, position = shard.view(-1, columns), 0
        for first, last in shard_ranges(row, number, len(shards)):
            whole[first:last] = own[position : position + last - first]
            position += last - first
    return whole


def _divided(row: Parameter, whole: Tensor, num_shards: int) -> list[Tensor]:
    """Return the flattened shards of a matrix; the inverse of `_joined`."""
    if row.tp_dim == 1:
        return [shard.flatten() for shard in whole.chunk(num_shards, dim=1)]
    return [
        torch.cat([whole[first:last] for first, last in shard_ranges(row, number, num_shards)]).flatten()
        for number in range(num_shards)
    ]
