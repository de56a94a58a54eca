"""Packing: every token once, nothing cut that fits, as full as the best fit gets."""

from bisect import bisect_left, insort

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_7b.data.samples.packing import pack_documents


def best_fit_rows(lengths: list[int], capacity: int) -> int:
    """Rows of the same method with a sorted list."""
    pieces = [min(capacity, length - at) for length in lengths for at in range(0, length, capacity)]
    rooms: list[int] = []
    count = 0
    for piece in sorted(pieces, reverse=True):
        found = bisect_left(rooms, piece)
        if found == len(rooms):
            count += 1
            insort(rooms, capacity - piece)
        else:
            insort(rooms, rooms.pop(found) - piece)
    return count


@given(
    lengths=st.lists(st.integers(0, 300) | st.integers(0, 6), max_size=80),
    seq_length=st.integers(1, 200) | st.integers(2, 8),
)
def test_every_document_once_and_none_cut_that_fits(lengths: list[int], seq_length: int) -> None:
    packing = pack_documents(np.array(lengths), seq_length)
    pieces: dict[int, list[tuple[int, int]]] = {number: [] for number, length in enumerate(lengths) if length}
    for row in range(packing.num_rows):
        inside = slice(packing.row_begin[row], packing.row_begin[row + 1])
        assert 0 < packing.length[inside].sum() <= seq_length
        assert (np.diff(packing.document[inside]) > 0).all()
        for document, offset, length in zip(
            packing.document[inside], packing.offset[inside], packing.length[inside], strict=True
        ):
            pieces[int(document)].append((int(offset), int(length)))
    for document, found in pieces.items():
        expected = [(at, min(seq_length, lengths[document] - at)) for at in range(0, lengths[document], seq_length)]
        assert sorted(found) == expected
    assert packing.num_rows == best_fit_rows(lengths, seq_length)
    assert packing.num_tokens == sum(lengths)


def test_short_documents_fill_their_rows() -> None:
    lengths = np.random.default_rng(0).lognormal(5.5, 1.0, 100_000).astype(np.int64)
    packing = pack_documents(lengths, 4096)
    assert packing.utilisation > 0.999
    assert packing.num_rows * 4096 * packing.utilisation == pytest.approx(lengths.sum())
    assert pack_documents(np.zeros(3), 8).utilisation == 1.0


def test_impossible_arguments() -> None:
    for lengths, seq_length in (([-1], 8), ([1], 0), ([1], 2**31)):
        with pytest.raises(ValueError, match=r"length|rows"):
            pack_documents(np.array(lengths), seq_length)
