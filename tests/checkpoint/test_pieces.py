"""Tensors in pieces: the rectangles of a flat range, and what ranks write in one division and read in another."""

import itertools
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_7b.checkpoint.pieces import Block, Piece, cut, rectangles
from megatron_7b.checkpoint.records import hash_files
from megatron_7b.checkpoint.shards import write_index, write_shard
from megatron_7b.checkpoint.stored import StoredTensors

SHAPE = (13, 7)
GATE_AND_UP = ((4, 7), (9, 7))
"""The rows of a local tensor that lie apart in the whole one, as gate and up rows do."""


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_rectangles_are_the_range(shape: list[int], data: st.DataObject) -> None:
    size = math.prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    elements = np.arange(size).reshape(shape)
    found = list(rectangles(start, stop, shape))
    values = [
        elements[tuple(slice(low, low + length) for low, length in zip(*place, strict=True))].ravel() for place in found
    ]
    assert list(itertools.chain.from_iterable(values)) == list(range(start, stop))
    assert len(found) <= 2 * len(shape) - 1


def blocks() -> list[Block]:
    """Two runs of rows whose order in memory is not that of the whole tensor."""
    (first, width), (second, _) = GATE_AND_UP
    return [Block(SHAPE, (second, 0), (first, width)), Block(SHAPE, (0, 0), (second, width))]


def whole() -> torch.Tensor:
    """The values in the order of the memory of one that holds everything."""
    return torch.arange(math.prod(SHAPE), dtype=torch.float32)


def stored(folder: Path) -> StoredTensors:
    return StoredTensors(folder, hash_files(folder, list(folder.iterdir())))


def write_ranges(folder: Path, ranges: list[tuple[int, int]]) -> None:
    """As ranks do, each a range."""
    shards = [
        write_shard(folder, rank, cut("w", blocks(), start, whole()[start:stop]))
        for rank, (start, stop) in enumerate(ranges)
    ]
    assert {shard.file: shard.record for shard in shards} == hash_files(folder, list(folder.iterdir()))
    write_index(folder, shards)


def read_ranges(folder: Path, ranges: list[tuple[int, int]]) -> list[float]:
    found = [torch.full((stop - start,), torch.nan) for start, stop in ranges]
    for (start, _), values in zip(ranges, found, strict=True):
        stored(folder).read(cut("w", blocks(), start, values))
    return torch.cat(found).tolist()


def test_any_division_reads_what_any_other_wrote(tmp_path: Path) -> None:
    size = math.prod(SHAPE)
    draw = random.Random(3)
    divisions = {n: list(itertools.pairwise([0, *sorted(draw.sample(range(1, size), n - 1)), size])) for n in (1, 2, 3)}
    for written, read in ((3, 2), (2, 3), (3, 1), (1, 2)):
        folder = tmp_path / f"{written}-{read}"
        write_ranges(folder, divisions[written])
        assert stored(folder).tensors.keys() == {"w"}
        assert read_ranges(folder, divisions[read]) == whole().tolist()


@pytest.mark.parametrize("ranges", [[(0, 40), (40, 90)], [(0, 60), (50, 91)]], ids=["gap", "overlap"])
def test_pieces_that_do_not_fit_together_are_no_checkpoint(ranges: list[tuple[int, int]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="global plan"):
        write_ranges(tmp_path, ranges)
    assert not (tmp_path / ".metadata").exists()


def read_beyond(folder: Path) -> list[list[float]]:
    """Read into a tensor with two rows more, as a vocabulary padded for another layout has."""
    values = torch.full((15, 7), torch.nan)
    stored(folder).read([Piece("w", Block((15, 7), (0, 0), (15, 7)), values)])
    return values.tolist()


def test_rows_beyond_the_written_ones_are_zero(tmp_path: Path) -> None:
    write_ranges(tmp_path, [(0, math.prod(SHAPE))])
    *written, first, second = read_beyond(tmp_path)
    assert first == second == [0.0] * 7
    assert sorted(itertools.chain.from_iterable(written)) == whole().tolist()
