"""Sequences that are divided over context-parallel ranks: who holds which positions, and attention over all of them.

Causal work grows with the position, so each rank holds one early and one late piece: of 2 × cp equal pieces, rank r has
piece r and piece 2 × cp - 1 - r, and all ranks have the same work.

Source: Transformer Engine's context parallelism, whose attention takes sequences that are divided in this way.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor


class Span(NamedTuple):
    """Queries that attend together: each of them to the keys up to its own position.

    Attributes:
        rows: Of the batch.
        queries: Of this rank's positions.
        keys: Of all positions; the last query is at the last of them.
    """

    rows: slice
    queries: slice
    keys: slice


def pieces_of(rank: int, size: int) -> tuple[int, int]:
    """Return which two of the 2 × size pieces of a sequence a rank holds, in order."""
    return rank, 2 * size - 1 - rank


def share_of(whole: Tensor, rank: int, size: int, *, dim: int) -> Tensor:
    """Return a rank's positions of a tensor over whole sequences, along the dimension of their positions."""
    if size == 1:
        return whole
    pieces = whole.chunk(2 * size, dim=dim)
    return torch.cat([pieces[piece] for piece in pieces_of(rank, size)], dim=dim)


def gather_sequence(share: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return whole sequences [s, ...] from the ranks' positions of them [s/cp, ...].

    The gradient is summed over ranks, each of which uses the whole.

    Collective: the context-parallel group, in the backward pass too.
    """
    gathered: Tensor = gather_from_sequence_parallel_region(share, tensor_parallel_output_grad=True, group=group)
    pieces = gathered.chunk(2 * group.size(), dim=0)
    held = [piece for rank in range(group.size()) for piece in pieces_of(rank, group.size())]
    return torch.cat([pieces[held.index(piece)] for piece in range(len(held))], dim=0)


def spans(rank: int, size: int, seq_length: int, num_rows: int, cu_seqlens: list[int] | None) -> Iterator[Span]:
    """Yield what of a rank's queries attends together.

    Args:
        rank: In the context-parallel group.
        size: Of the group.
        seq_length: Positions s of a whole sequence.
        num_rows: Sequences b.
        cu_seqlens: Where documents begin among the b × s tokens, and their number: none sees another. None: a sequence
            is one.
    """
    length = seq_length // (2 * size)
    for place, piece in enumerate(pieces_of(rank, size)):
        begin, end = piece * length, (piece + 1) * length
        if cu_seqlens is None:
            yield Span(slice(None), slice(place * length, (place + 1) * length), slice(0, end))
            continue
        offset = place * length - begin  # from a position to this rank's number of it
        for row in range(num_rows):
            first = row * seq_length
            for document, next_document in pairwise(cu_seqlens):
                low, high = max(begin, document - first), min(end, next_document - first)
                if low < high:
                    queries = slice(low + offset, high + offset)
                    yield Span(slice(row, row + 1), queries, slice(max(0, document - first), high))
