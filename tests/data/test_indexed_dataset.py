"""The MMIDIDX files: the same bytes as Megatron's, and nothing foreign or damaged gets past the reader."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_7b.data import IndexedDataset, IndexWriter, token_bytes_for
from megatron_7b.errors import DataFormatError, PathError
from tests.data.corpora import random_documents, write_corpus

DOCUMENTS = [[1, 2, 3], [4], [], [5, 6], [7, 8, 9, 10]]


def read_all(prefix: str | Path) -> list[list[int]]:
    """Every document of a fully checked corpus."""
    dataset = IndexedDataset(prefix, verify=True)
    return [dataset.document(index).tolist() for index in range(dataset.num_documents)]


@pytest.mark.parametrize("token_bytes", [2, 4])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_what_is_written_is_read(tmp_path: Path, token_bytes: int, dtype: type[np.integer]) -> None:
    writer = IndexWriter(str(tmp_path / "one"), token_bytes)
    for document in DOCUMENTS:
        writer.add_document(np.array(document, dtype=dtype))
    assert not list(tmp_path.glob("*.bin")), "nothing is published before it is complete"
    writer.finish()
    many = IndexWriter(str(tmp_path / "many"), token_bytes)
    many.add_documents(np.concatenate(DOCUMENTS).astype(dtype), np.array([len(d) for d in DOCUMENTS], dtype=np.int32))
    many.finish()

    assert read_all(tmp_path / "one") == DOCUMENTS
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"many{suffix}").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many.bin", "many.idx", "one.bin", "one.idx"]


def test_strided_ids_are_written_in_their_order(tmp_path: Path) -> None:
    writer = IndexWriter(str(tmp_path / "a"), 4)
    writer.add_document(np.arange(20, dtype=np.int32)[::-3])
    writer.finish()
    assert read_all(tmp_path / "a") == [list(range(19, -1, -3))]


@settings(max_examples=25)
@given(
    documents=st.lists(st.lists(st.lists(st.integers(0, 65499), max_size=5), max_size=4), max_size=6),
    vocab_size=st.sampled_from([65499, 65500]),
)
def test_same_bytes_as_megatron(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[list[int]]], vocab_size: int
) -> None:
    stock = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    folder = tmp_path_factory.mktemp("corpora")
    theirs = stock.IndexedDatasetBuilder(str(folder / "theirs.bin"), dtype=stock.DType.optimal_dtype(vocab_size))
    ours = IndexWriter(str(folder / "ours"), token_bytes_for(vocab_size))
    for sequences in documents:
        ids = np.array([token for sequence in sequences for token in sequence], dtype=np.int64)
        lengths = [len(sequence) for sequence in sequences]
        theirs.add_document(ids, lengths)
        ours.add_document(ids, np.array(lengths, dtype=np.int64))
    theirs.finalize(str(folder / "theirs.idx"))
    ours.finish()

    for suffix in (".bin", ".idx"):
        assert (folder / f"ours{suffix}").read_bytes() == (folder / f"theirs{suffix}").read_bytes()
    assert read_all(folder / "theirs") == [[token for sequence in d for token in sequence] for d in documents]


def test_stock_megatron_reads_our_files(tmp_path: Path) -> None:
    stock = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    documents = [document for document in random_documents(0, 500, vocab_size=60000) if document]
    dataset = stock.IndexedDataset(write_corpus(tmp_path / "a", documents))
    assert len(dataset) == len(documents)
    assert all((dataset[i] == document).all() for i, document in enumerate(documents))
    assert dataset.document_indices.tolist() == list(range(len(documents) + 1))


def test_ids_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    writer = IndexWriter(str(tmp_path / "a"), 2)
    for bad in (65536, -1):
        with pytest.raises(DataFormatError, match=r"a\.bin"):
            writer.add_document(np.array([1, bad], dtype=np.int64))


def test_lengths_that_do_not_add_up_are_refused(tmp_path: Path) -> None:
    writer = IndexWriter(str(tmp_path / "a"), 2)
    for lengths in ([2, 2], [3, -1, 1], [1, 1], []):
        with pytest.raises(ValueError, match="length"):
            writer.add_documents(np.arange(3, dtype=np.uint16), np.array(lengths, dtype=np.int64))
    with pytest.raises(TypeError, match="float"):
        writer.add_document(np.ones(3))  # type: ignore[arg-type]


def test_an_unfinished_writer_leaves_nothing(tmp_path: Path) -> None:
    writer = IndexWriter(str(tmp_path / "a"), 2)
    writer.add_document(np.arange(10, dtype=np.int64))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.bin.tmp", "a.idx.tmp"]
    del writer
    assert not list(tmp_path.iterdir())
    aborted = IndexWriter(str(tmp_path / "a"), 2)
    aborted.abort()
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="finished or aborted"):
        aborted.finish()


def test_a_folder_that_cannot_be_written_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="absent"):
        IndexWriter(str(tmp_path / "absent" / "a"), 2)


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_truncation_at_every_byte_is_noticed(tmp_path: Path, suffix: str) -> None:
    write_corpus(tmp_path / "a", DOCUMENTS)
    file = tmp_path / f"a{suffix}"
    content = file.read_bytes()
    for length in range(len(content)):
        file.write_bytes(content[:length])
        with pytest.raises(DataFormatError, match=r"a\.(idx|bin)"):
            IndexedDataset(tmp_path / "a")
    file.write_bytes(content + b"\0")
    with pytest.raises(DataFormatError, match=r"a\.(idx|bin)"):
        IndexedDataset(tmp_path / "a")


@given(data=st.data())
def test_a_changed_index_never_crashes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("changed")
    write_corpus(folder / "a", DOCUMENTS)
    content = bytearray((folder / "a.idx").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 8))
        size = data.draw(st.integers(1, 8))
        content[at : at + size] = data.draw(st.binary(min_size=size, max_size=size))
    (folder / "a.idx").write_bytes(bytes(content))
    outcome: object = None
    try:
        outcome = read_all(folder / "a")
    except DataFormatError as error:
        outcome = str(error)
    assert isinstance(outcome, list) or str(folder) in str(outcome)


@given(content=st.binary(max_size=200), magic=st.booleans())
def test_foreign_files_never_crash(tmp_path_factory: pytest.TempPathFactory, content: bytes, magic: bool) -> None:
    folder = tmp_path_factory.mktemp("foreign")
    (folder / "a.idx").write_bytes((b"MMIDIDX\0\0\1\0\0\0\0\0\0\0\4" if magic else b"") + content)
    (folder / "a.bin").write_bytes(content)
    with pytest.raises(DataFormatError, match=r"a\.idx"):
        IndexedDataset(folder / "a")


def test_damage_between_the_spot_checks_is_found_by_verify_and_at_use(tmp_path: Path) -> None:
    num_documents = 200_000  # Opening looks at every third entry.
    writer = IndexWriter(str(tmp_path / "a"), 2)
    writer.add_documents(np.zeros(num_documents, dtype=np.uint16), np.ones(num_documents, dtype=np.int64))
    writer.finish()
    pointer = 34 + 4 * num_documents + 8 * 1_000
    with (tmp_path / "a.idx").open("r+b") as stream:
        stream.seek(pointer)
        stream.write((2**40).to_bytes(8, "little"))
    dataset = IndexedDataset(tmp_path / "a")
    with pytest.raises(DataFormatError, match="sequence 1000"):
        dataset[1000]
    with pytest.raises(DataFormatError, match="sequence 1000"):
        IndexedDataset(tmp_path / "a", verify=True)


def test_files_of_two_runs_are_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", DOCUMENTS)
    write_corpus(tmp_path / "b", [*DOCUMENTS, [1]])
    shutil.copy(tmp_path / "b.bin", tmp_path / "a.bin")
    with pytest.raises(DataFormatError, match="not of one run"):
        IndexedDataset(tmp_path / "a")


def test_a_missing_corpus_names_what_is_near(tmp_path: Path) -> None:
    write_corpus(tmp_path / "speeches_text_document", DOCUMENTS)
    assert len(IndexedDataset(tmp_path / "speeches")) == len(DOCUMENTS)
    assert len(IndexedDataset(tmp_path / "speeches_text_document.idx")) == len(DOCUMENTS)
    with pytest.raises(PathError, match="speeches_text_document"):
        IndexedDataset(tmp_path / "speech")


def test_views_outlive_the_dataset(tmp_path: Path) -> None:
    dataset = IndexedDataset(write_corpus(tmp_path / "a", DOCUMENTS))
    first, lengths = dataset[0], dataset.sequence_lengths
    del dataset
    assert first.tolist() == DOCUMENTS[0]
    assert lengths.tolist() == [len(document) for document in DOCUMENTS]
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 0


def test_an_empty_corpus_is_legal(tmp_path: Path) -> None:
    assert read_all(write_corpus(tmp_path / "a", [])) == []
    assert read_all(write_corpus(tmp_path / "b", [[], []])) == [[], []]


@pytest.mark.parametrize("value", [-5, 2**40, 3])
def test_damage_where_opening_did_not_look(tmp_path: Path, value: int) -> None:
    """A large index is not checked entry by entry when it is opened, but each entry is where it is used."""
    count, bad = 100_000, 54_321
    writer = IndexWriter(str(tmp_path / "a"), 2)
    writer.add_documents(np.ones(count, dtype=np.uint16), np.ones(count, dtype=np.int64))
    writer.finish()
    index = bytearray((tmp_path / "a.idx").read_bytes())
    begin = 34 + 12 * count + 8 * bad
    index[begin : begin + 8] = value.to_bytes(8, "little", signed=True)
    (tmp_path / "a.idx").write_bytes(bytes(index))
    dataset = IndexedDataset(tmp_path / "a")
    assert len(dataset.document(bad - 2)) == 1
    with pytest.raises(DataFormatError, match=f"document {bad - 1} has the sequences from {bad - 1} to {value}"):
        dataset.document(bad - 1)
    with pytest.raises(DataFormatError, match="has the sequences from"):
        dataset.document_lengths()
    with pytest.raises(DataFormatError, match="document"):
        IndexedDataset(tmp_path / "a", verify=True)


def test_a_negative_length_where_opening_did_not_look(tmp_path: Path) -> None:
    count, bad = 100_000, 54_321
    writer = IndexWriter(str(tmp_path / "a"), 2)
    writer.add_documents(np.ones(count, dtype=np.uint16), np.ones(count, dtype=np.int64))
    writer.finish()
    index = bytearray((tmp_path / "a.idx").read_bytes())
    index[34 + 4 * bad : 38 + 4 * bad] = (-1).to_bytes(4, "little", signed=True)
    (tmp_path / "a.idx").write_bytes(bytes(index))
    dataset = IndexedDataset(tmp_path / "a")
    for use in (dataset.document_lengths, lambda: dataset[bad]):
        with pytest.raises(DataFormatError, match=f"sequence {bad}"):
            use()
