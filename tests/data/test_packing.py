"""Packing: every token once, nothing cut that fits, as full as the best fit gets, and batches that show it."""

from bisect import bisect_left, insort
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_7b.data.samples.loader import BatchLoader
from megatron_7b.data.samples.packing import PackedDataset, pack_documents
from megatron_7b.errors import DataFormatError
from tests.data.corpora import random_documents, write_corpus


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


@pytest.fixture
def documents() -> list[list[int]]:
    """Every id once; some documents are empty, one is longer than two rows."""
    lengths = [len(document) for document in random_documents(3, 40, max_length=20)] + [75]
    ends = np.cumsum(lengths)
    return [list(range(end - length, end)) for end, length in zip(ends, lengths, strict=True)]


def test_batches_hold_each_document_once(documents: list[list[int]], tmp_path: Path) -> None:
    dataset = PackedDataset(write_corpus(tmp_path / "a", documents), seq_length=32, seed=1, pad_id=9999)
    batch = dataset.batch(range(dataset.num_samples))
    assert batch.cu_seqlens is not None
    segments = np.split(batch.tokens.ravel(), batch.cu_seqlens[1:-1])
    inside = np.split(batch.position_ids.ravel(), batch.cu_seqlens[1:-1])
    assert all(positions.tolist() == list(range(len(positions))) for positions in inside)
    found = sorted(tuple(segment.tolist()) for segment in segments if segment[0] != 9999)
    pieces = [tuple(document[at : at + 32]) for document in documents for at in range(0, len(document), 32)]
    assert found == sorted(pieces)
    # Ids count up within a document, and the last of each is predicted by none.
    counts = batch.loss_mask == 1
    assert (batch.labels[counts] == batch.tokens[counts] + 1).all()
    last = {document[-1] for document in documents if document}
    assert sorted(batch.tokens[~counts & (batch.tokens != 9999)].tolist()) == sorted(last)
    assert set(batch.cu_seqlens.tolist()) >= set(range(0, batch.tokens.size + 1, 32))


def test_epochs_are_shuffled_and_a_number_is_all_the_state(documents: list[list[int]], tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "a", documents)
    first, again = (PackedDataset(prefix, seq_length=32, seed=1, pad_id=0) for _ in range(2))
    rows = first.num_samples
    epochs = [[first.row_of(epoch * rows + i) for i in range(rows)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    np.testing.assert_array_equal(again.batch([7, 40]).tokens, first.batch(range(50)).tokens[[7, 40]])


def test_nothing_to_pack(tmp_path: Path) -> None:
    with pytest.raises(DataFormatError, match="no tokens to pack"):
        PackedDataset(write_corpus(tmp_path / "a", [[], []]), seq_length=32, seed=1, pad_id=0)


def test_the_loader_reads_it(documents: list[list[int]], tmp_path: Path) -> None:
    dataset = PackedDataset(write_corpus(tmp_path / "a", documents), seq_length=32, seed=1, pad_id=0)
    with BatchLoader(dataset, micro_batch_size=2, data_parallel_rank=1, data_parallel_size=2) as loader:
        (batch,) = loader.batches(4, 4)
    np.testing.assert_array_equal(batch.tokens, dataset.batch([6, 7]).tokens)
