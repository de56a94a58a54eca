"""Tensors that ranks hold in arbitrary rectangular pieces, as torch's distributed checkpoints can store them.

What a data-parallel rank owns of the optimizer's state, or writes of the weights, is a range of flattened parameters.
Such a range consists of a few rectangles of each parameter. torch's format stores any rectangles that cover a tensor
(`shards.py` writes them), and `stored.py` reads any others from them; so every rank writes what it has, reads what it
needs, and nothing is gathered.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Block:
    """A rectangle of a whole tensor that is in one run of a rank's memory.

    Attributes:
        whole_shape: Shape of the whole tensor.
        offsets: Of the rectangle's first element in the whole tensor.
        shape: Of the rectangle.
    """

    whole_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """A rectangle of a whole tensor with its values.

    Attributes:
        name: Of the whole tensor.
        place: Where the rectangle is in it.
        data: Values, of shape `place.shape`: written from, or read into.
    """

    name: str
    place: Block
    data: Tensor


def rectangles(start: int, stop: int, shape: Sequence[int]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut the elements start … stop-1 of a row-major tensor into rectangles, at most 2 × dimensions - 1.

    Yields:
        (offsets, shape) of each, in the order of the elements.
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        yield (start,) * len(shape), (stop - start,) * len(shape)
        return
    row = math.prod(shape[1:])
    first, last = start // row, (stop - 1) // row
    if first == last and stop - start < row:
        for offsets, sizes in rectangles(start - first * row, stop - first * row, shape[1:]):
            yield (first, *offsets), (1, *sizes)
        return
    body_start, body_stop = -(-start // row), stop // row
    yield from rectangles(start, min(stop, body_start * row), shape) if start % row else ()
    if body_start < body_stop:
        yield (body_start, *(0 for _ in shape[1:])), (body_stop - body_start, *shape[1:])
    yield from rectangles(max(start, body_stop * row), stop, shape) if stop % row else ()


def cut(name: str, blocks: Sequence[Block], start: int, flat: Tensor) -> list[Piece]:
    """Describe a range of a flattened local tensor as pieces of the whole one.

    Args:
        name: Of the whole tensor.
        blocks: What the local tensor consists of, in the order of its memory.
        start: Where the range begins in the flattened local tensor.
        flat: The range, 1-D; the pieces are views of it.
    """
    pieces = []
    ends = list(itertools.accumulate(math.prod(block.shape) for block in blocks))
    for block, block_stop in zip(blocks, ends, strict=True):
        block_start = block_stop - math.prod(block.shape)
        position = max(start, block_start) - start
        stop = min(start + flat.numel(), block_stop) - block_start
        for offsets, shape in rectangles(max(start - block_start, 0), stop, block.shape):
            values = flat[position : position + math.prod(shape)].view(shape)
            place = tuple(a + b for a, b in zip(block.offsets, offsets, strict=True))
            pieces.append(Piece(name, Block(block.whole_shape, place, shape), values))
            position += math.prod(shape)
    return pieces
