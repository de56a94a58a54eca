"""Tensors that ranks hold in arbitrary rectangular pieces, written in the format of torch's distributed checkpoints.

megatron-core's sharded tensors lie on a regular grid. The share of the optimizer state that a data-parallel rank owns
does not: it is a range of a flattened parameter. Such a range consists of a few rectangles of the parameter. torch's
format stores any rectangles that cover a tensor, and `stored.py` reads any others from them; so every rank writes what
it has, reads what it needs, and nothing is gathered.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save


@dataclass(frozen=True)
class Block:
    """A rectangle of a whole tensor that lies in one run of a rank's memory.

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
        place: Where the rectangle lies in it.
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


def write_pieces(folder: Path, pieces: Sequence[Piece]) -> None:
    """Write the pieces of all ranks, which together cover each tensor exactly once, into a folder: one file per rank.

    Collective: all ranks.

    Raises:
        CheckpointException: a rank could not write, or pieces overlap or leave gaps. All ranks raise it.
    """
    save({}, storage_writer=FileSystemWriter(folder), planner=_SavePlanner(pieces))


def _by_place(pieces: Sequence[Piece]) -> dict[tuple[str, tuple[int, ...]], Tensor]:
    return {(piece.name, piece.place.offsets): piece.data for piece in pieces}


def _chunk(place: Block) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(place.offsets), torch.Size(place.shape))


class _SavePlanner(DefaultSavePlanner):
    """Writes this rank's pieces; torch checks that those of all ranks cover each tensor."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._pieces = pieces
        self._data = _by_place(pieces)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(
            [
                WriteItem(
                    MetadataIndex(piece.name, torch.Size(piece.place.offsets)),
                    WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        chunk=_chunk(piece.place),
                        properties=TensorProperties.create_from_tensor(piece.data),
                        size=torch.Size(piece.place.whole_shape),
                    ),
                )
                for piece in self._pieces
            ]
        )
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self._data[index.fqn, tuple(index.offset)]
