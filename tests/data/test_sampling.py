"""The order of one corpus: every token exactly once per epoch, and the same as a reference that builds its tables."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_7b.data import Dataset, IndexedDataset
from megatron_7b.data._index import Batcher, Permutation, TokenStream
from megatron_7b.data.samples.sample_order import Continuation, SampleOrder
from megatron_7b.data.samples.sampling import open_stream, stream_key
from megatron_7b.errors import DataFormatError
from tests.data.corpora import ReferenceStream, permute, random_documents, write_corpus

keys = st.integers(0, 2**64 - 1)


def as_dataset(stream: TokenStream, seq_length: int, *, vocab_size: int = 0) -> Dataset:
    """A dataset of one stream."""
    order = SampleOrder(seq_length=seq_length, seed=0, sets=())
    return Dataset([], Batcher([stream], seq_length=seq_length, vocab_size=vocab_size), Continuation(order))


@given(size=st.integers(1, 300), key=keys)
def test_the_permutation_is_a_bijection_and_equals_its_reference(size: int, key: int) -> None:
    permutation = Permutation(size, key)
    order = [permutation(index) for index in range(size)]
    assert sorted(order) == list(range(size))
    assert order == [permute(index, size, key) for index in range(size)]


@given(size=st.integers(1, 2**60), key=keys, data=st.data())
def test_the_permutation_of_huge_ranges(size: int, key: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, size - 1))
    assert Permutation(size, key)(index) == permute(index, size, key)


def test_the_permutation_mixes() -> None:
    """Neighbours end up far apart, and keys give unrelated orders: fractions of what chance gives."""
    size = 10_007
    order = np.array([Permutation(size, 5)(index) for index in range(size)])
    other = np.array([Permutation(size, 6)(index) for index in range(size)])
    assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < 0.04
    assert abs(np.corrcoef(order, other)[0, 1]) < 0.04
    assert abs(np.abs(np.diff(order)).mean() / size - 1 / 3) < 0.01
    assert (order == other).sum() < 10


@given(seed=st.integers(0, 1000), num_documents=st.integers(2, 12), seq_length=st.integers(1, 30), key=keys)
def test_equals_the_reference(
    tmp_path_factory: pytest.TempPathFactory, seed: int, num_documents: int, seq_length: int, key: int
) -> None:
    documents = [[1, 2], *random_documents(seed, num_documents), list(range(40))]
    dataset = IndexedDataset(write_corpus(tmp_path_factory.mktemp("c") / "a", documents))
    native = as_dataset(open_stream(dataset, seq_length=seq_length, key=key), seq_length)
    expected = ReferenceStream(documents, seq_length, key).samples(3 * dataset.num_tokens // seq_length + 2)
    batch = native.batch(range(len(expected)))
    np.testing.assert_array_equal(batch.tokens, expected[:, :-1])
    np.testing.assert_array_equal(batch.labels, expected[:, 1:])
    assert (batch.loss_mask == 1).all()
    assert (batch.position_ids == np.arange(seq_length)).all()


@given(
    seed=st.integers(0, 1000),
    seq_length=st.integers(1, 30),
    key=keys,
    first=st.integers(0, 10),
    rows=st.integers(1, 5),
    reset_position_ids=st.booleans(),
)
def test_document_boundaries_equal_the_reference(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    seq_length: int,
    key: int,
    first: int,
    rows: int,
    reset_position_ids: bool,
) -> None:
    documents = [[1, 2], [], [3], *random_documents(seed, 8, max_length=15), [], list(range(40))]
    dataset = IndexedDataset(write_corpus(tmp_path_factory.mktemp("c") / "a", documents))
    stream = open_stream(dataset, seq_length=seq_length, key=key)
    batcher = Batcher([stream], seq_length=seq_length, document_boundaries=True, reset_position_ids=reset_position_ids)
    _, _, _, position_ids, cu_seqlens = batcher.assemble(np.arange(first, first + rows))
    begins = ReferenceStream(documents, seq_length, key).document_begins(first + rows)[first:, :-1]
    assert cu_seqlens is not None
    assert cu_seqlens.tolist() == [*np.flatnonzero(begins.ravel()), rows * seq_length]
    place = np.broadcast_to(np.arange(seq_length), begins.shape)
    start = np.maximum.accumulate(np.where(begins, place, 0), axis=1) if reset_position_ids else 0
    np.testing.assert_array_equal(position_ids, place - start)


@given(num_tokens=st.integers(8, 200), seq_length=st.integers(1, 7), key=keys, epochs=st.integers(1, 4))
def test_every_token_exactly_once_per_epoch(
    tmp_path_factory: pytest.TempPathFactory, num_tokens: int, seq_length: int, key: int, epochs: int
) -> None:
    """All ids differ, so that counting ids counts positions."""
    ids = list(range(num_tokens))
    cuts = [0, num_tokens // 3, num_tokens // 2, num_tokens]
    documents = [ids[a:b] for a, b in pairwise(cuts)]
    dataset = IndexedDataset(write_corpus(tmp_path_factory.mktemp("c") / "a", documents))
    stream = open_stream(dataset, seq_length=seq_length, key=key)
    num_samples = -(-epochs * num_tokens // seq_length)
    batch = as_dataset(stream, seq_length).batch(range(num_samples))
    counts = np.bincount(batch.tokens.ravel(), minlength=num_tokens)
    # The last sample goes on into the next epoch by what is missing to a whole number of samples.
    beyond = num_samples * seq_length - epochs * num_tokens
    assert 0 <= beyond < seq_length
    assert counts.min() == epochs
    assert (counts - epochs).sum() == beyond
    assert [stream.epoch_of(i) for i in range(num_samples)] == sorted(stream.epoch_of(i) for i in range(num_samples))
    # Inside a document, a label is the token that follows.
    inside = ~np.isin(batch.tokens, [cut - 1 for cut in cuts])
    assert (batch.labels[inside] == batch.tokens[inside] + 1).all()


def test_cuts_move_and_orders_differ_from_epoch_to_epoch(tmp_path: Path) -> None:
    documents = [list(range(start, start + 10)) for start in range(0, 400, 10)]
    dataset = IndexedDataset(write_corpus(tmp_path / "a", documents))
    native = as_dataset(open_stream(dataset, seq_length=16, key=3), 16)  # 400 is a multiple of 16.
    first, second = (native.batch(range(25 * epoch, 25 * epoch + 25)).tokens[:, 0] for epoch in (0, 1))
    assert set(first) != set(second)
    assert first.tolist() != sorted(first.tolist())


def test_seeds_splits_and_sets_have_their_own_orders() -> None:
    keys_seen = {stream_key(seed, split, n) for seed in (1, 2) for split in ("train", "valid") for n in (0, 1)}
    assert len(keys_seen) == 8


def test_without_shuffling_every_token_is_predicted_once(tmp_path: Path) -> None:
    documents = [list(range(1, 8)), list(range(8, 24))]
    dataset = IndexedDataset(write_corpus(tmp_path / "a", documents))
    stream = open_stream(dataset, seq_length=5, shuffle=False)
    assert stream.num_samples == 5
    batch = as_dataset(stream, 5).batch(range(stream.num_samples + 2))
    assert batch.labels[batch.loss_mask == 1].tolist() == list(range(2, 24))
    assert (batch.tokens[5:] == 0).all()


def test_ids_beyond_the_vocabulary_name_file_and_document(tmp_path: Path) -> None:
    documents = [[1] * 20, [2] * 10 + [500] + [2] * 10, [3] * 20]
    for token_bytes in (2, 4):
        dataset = IndexedDataset(write_corpus(tmp_path / "a", documents, token_bytes=token_bytes))
        stream = open_stream(dataset, seq_length=8, key=1)
        with pytest.raises(DataFormatError, match=r"a\.bin: token id 500 in document 1 \(its token 10\).*of 500"):
            as_dataset(stream, 8, vocab_size=500).batch(range(10))
        as_dataset(stream, 8, vocab_size=501).batch(range(10))


def test_negative_ids_are_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", [[1] * 20], token_bytes=4)
    (tmp_path / "a.bin").write_bytes(np.array([1] * 19 + [-7], dtype=np.int32).tobytes())
    stream = open_stream(IndexedDataset(tmp_path / "a"), seq_length=8)
    for vocab_size in (0, 100):
        with pytest.raises(DataFormatError, match="token id -7 in document 0"):
            as_dataset(stream, 8, vocab_size=vocab_size).batch(range(4))


def test_sequences_out_of_order_are_refused_for_samples(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", [[1] * 10, [2] * 10])
    index = bytearray((tmp_path / "a.idx").read_bytes())
    index[42:50], index[50:58] = index[50:58], index[42:50]
    (tmp_path / "a.idx").write_bytes(bytes(index))
    dataset = IndexedDataset(tmp_path / "a", verify=True)
    assert dataset[0].tolist() == [2] * 10
    with pytest.raises(DataFormatError, match="do not follow one another"):
        open_stream(dataset, seq_length=4)


def test_fewer_tokens_than_a_sample_are_refused(tmp_path: Path) -> None:
    dataset = IndexedDataset(write_corpus(tmp_path / "a", [[1] * 8]))
    open_stream(dataset, seq_length=7)
    with pytest.raises(DataFormatError, match="hold 8 tokens, fewer than the 9"):
        open_stream(dataset, seq_length=8)
