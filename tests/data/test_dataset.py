"""Splits and blends as a run opens them."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_7b.config.schema import DataConfig
from megatron_7b.data import IndexedDataset, Split, has_split, open_sequential, open_split
from megatron_7b.data.samples.split import SPLITS
from megatron_7b.errors import ConfigError, DataFormatError
from tests.data.corpora import random_documents, write_corpus

SETS = (("large", 0, 100), ("tiny", 2000, 8), ("medium", 3000, 50))
"""Name, first id and number of documents of ten tokens."""


def write_numbered(prefix: Path, first_id: int, num_documents: int, length: int = 10) -> str:
    """A corpus in which every id occurs once."""
    starts = range(first_id, first_id + num_documents * length, length)
    return write_corpus(prefix, [list(range(start, start + length)) for start in starts])


def test_splits_share_no_token(tmp_path: Path) -> None:
    prefix = write_numbered(tmp_path / "a", 0, 100)
    config = DataConfig(train=(prefix,), split="80,15,5", seq_length=8)
    seen = {}
    sizes: dict[Split, int] = {"train": 80, "valid": 15, "test": 5}
    for split, num_documents in sizes.items():
        dataset = open_split(config, split, seed=1)
        assert dataset.num_tokens == num_documents * 10
        seen[split] = set(dataset.batch(range(dataset.num_samples)).tokens.ravel().tolist())
        assert len(seen[split]) == num_documents * 10
    assert not seen["train"] & seen["valid"]
    assert not seen["valid"] & seen["test"]


def test_a_validation_corpus_leaves_the_split_to_training(tmp_path: Path) -> None:
    train, valid = write_numbered(tmp_path / "a", 0, 100), write_numbered(tmp_path / "b", 1000, 20)
    config = DataConfig(train=(train,), valid=(valid,), split="90,5,5", seq_length=8)
    assert open_split(config, "train", seed=1).num_tokens == 950
    assert open_split(config, "valid", seed=1).batch(range(10)).tokens.min() >= 1000
    assert open_split(config, "test", seed=1).num_tokens == 50


def test_has_split(tmp_path: Path) -> None:
    prefix = write_numbered(tmp_path / "a", 0, 100)
    config = DataConfig(train=(prefix,), split="98,2,0", seq_length=8)
    assert [has_split(config, split) for split in SPLITS] == [True, True, False]
    longer = DataConfig(train=(prefix,), split="98,2,0", seq_length=20)
    assert not has_split(longer, "valid")
    with pytest.raises(DataFormatError, match=r"data\.split"):
        open_split(longer, "valid", seed=1)
    with pytest.raises(ConfigError, match="no documents for 'test'"):
        open_split(config, "test", seed=1)
    assert not has_split(DataConfig(), "train")


def test_sets_without_validation_documents_are_left_out_of_validation(tmp_path: Path) -> None:
    """The others keep the proportion of their weights, and read the same samples as without the small ones."""
    large, tiny, medium = (write_numbered(tmp_path / name, n, count) for name, n, count in SETS)
    config = DataConfig(train=("0.6", large, "0.1", tiny, "0.3", medium), split="90,8,2", seq_length=16)
    valid = open_split(config, "valid", seed=1)
    assert valid.left_out == (tiny,)
    assert [part.share for part in valid.parts] == [0.6 / 0.9, pytest.approx(1 / 3)]
    assert open_split(config, "train", seed=1).left_out == ()
    sets, _ = valid.locate(range(90))
    assert np.bincount(sets).tolist() == [60, 30]
    tokens = valid.batch(range(90)).tokens
    assert (tokens[sets == 0] < 1000).all()
    assert (tokens[sets == 1] >= 3000).all()
    # Only 2 % of the largest set are long enough for a test sample.
    assert open_split(config, "test", seed=1).left_out == (tiny, medium)
    nothing = replace(config, train=(tiny,))
    assert not has_split(nothing, "valid")
    with pytest.raises(DataFormatError, match="tiny: documents 7 to 8"):
        open_split(nothing, "valid", seed=1)


def test_sets_that_were_named_for_their_purpose_are_not_left_out(tmp_path: Path) -> None:
    large, tiny, medium = (write_numbered(tmp_path / name, n, count) for name, n, count in SETS)
    config = DataConfig(train=("1", large, "1", tiny), valid=("1", medium, "1", tiny), seq_length=90)
    assert has_split(config, "valid")
    with pytest.raises(DataFormatError, match="tiny: documents 0 to 8 .* hold 80 tokens, fewer than the 91"):
        open_split(config, "valid", seed=1)
    with pytest.raises(DataFormatError, match="tiny: documents 0 to 8"):
        open_split(config, "train", seed=1)
    empty = write_corpus(tmp_path / "empty", [])
    hollow = write_corpus(tmp_path / "hollow", [[], [], []])
    for prefix in (empty, hollow):
        with pytest.raises(DataFormatError, match=f"{Path(prefix).name}: documents .* hold 0 tokens"):
            open_split(DataConfig(train=("1", large, "1", prefix), split="1", seq_length=8), "train", seed=1)
    # A split whose share of a set rounds to nothing.
    one_document = write_corpus(tmp_path / "one", [list(range(100))])
    with pytest.raises(DataFormatError, match=r"one: documents 0 to 0 \(of 1\)"):
        open_split(DataConfig(train=(one_document,), split="40,60", seq_length=8), "train", seed=1)
    assert not has_split(DataConfig(train=(one_document,), seq_length=8), "valid")


def test_a_blend_reads_its_sets_by_their_shares_each_in_its_own_order(tmp_path: Path) -> None:
    prefixes = [write_numbered(tmp_path / name, 2000 * n, 100) for n, name in enumerate("abc")]
    config = DataConfig(train=("0.5", prefixes[0], "0.3", prefixes[1], "0.2", prefixes[2]), split="1", seq_length=8)
    blend = open_split(config, "train", seed=5)
    batch = blend.batch(range(200))
    sets, samples = blend.locate(range(200))
    assert (batch.tokens // 2000 == sets[:, None]).all()
    assert np.bincount(sets).tolist() == [100, 60, 40]
    assert [part.share for part in blend.parts] == [0.5, 0.3, 0.2]
    # Within the blend a set is read in the order of its numbers, and each epoch of it is complete.
    assert samples[sets == 0].tolist() == list(range(100))
    again = open_split(config, "train", seed=6).batch(range(200)).tokens
    assert (again != batch.tokens).any()


def test_eod_masking(tmp_path: Path) -> None:
    eod = 999
    documents = [[*document, eod] for document in random_documents(1, 50, vocab_size=900)]
    config = DataConfig(train=(write_corpus(tmp_path / "a", documents),), split="1", seq_length=16, eod_mask_loss=True)
    batch = open_split(config, "train", seed=1, eod_id=eod).batch(range(20))
    assert (batch.tokens == eod).any()
    np.testing.assert_array_equal(batch.loss_mask, np.where(batch.tokens == eod, 0, 1))
    with pytest.raises(ConfigError, match="eod_mask_loss"):
        open_split(config, "train", seed=1)


def test_documents_are_told_apart_where_asked(tmp_path: Path) -> None:
    """Every id is its document's number, so that a document is a run of equal ids."""
    prefix = write_corpus(tmp_path / "a", [[number] * (number % 9) for number in range(100)])
    config = DataConfig(train=(prefix,), split="1", seq_length=16, reset_attention_mask=True, reset_position_ids=True)
    batch = open_split(config, "train", seed=1).batch(range(20))
    new = np.diff(batch.tokens, axis=1, prepend=-1) != 0
    assert batch.cu_seqlens is not None
    assert batch.cu_seqlens.tolist() == [*np.flatnonzero(new), 320]
    assert (batch.position_ids == 0).ravel()[batch.cu_seqlens[:-1]].all()
    assert np.count_nonzero(batch.position_ids == 0) == len(batch.cu_seqlens) - 1
    plain = open_split(replace(config, reset_attention_mask=False, reset_position_ids=False), "train", seed=1)
    assert plain.batch(range(20)).cu_seqlens is None
    np.testing.assert_array_equal(plain.batch(range(20)).tokens, batch.tokens)


def test_sequential_reads_the_file_as_it_is(tmp_path: Path) -> None:
    documents = random_documents(3, 30)
    prefix = write_corpus(tmp_path / "a_text_document", documents)
    ids = np.concatenate([IndexedDataset(prefix).document(i) for i in range(30)])
    dataset = open_sequential(tmp_path / "a", seq_length=32, vocab_size=1000)
    batch = dataset.batch(range(dataset.num_samples))
    np.testing.assert_array_equal(batch.labels[batch.loss_mask == 1], ids[1:])


def test_a_batch_stays_as_it_is_while_it_is_referred_to(tmp_path: Path) -> None:
    dataset = open_split(DataConfig(train=(write_numbered(tmp_path / "a", 0, 100),), seq_length=8), "train", seed=1)
    labels = dataset.batch([0, 1]).labels
    expected = labels.copy()
    for start in range(2, 100, 2):
        dataset.batch([start, start + 1])
    np.testing.assert_array_equal(labels, expected)


def test_negative_numbers_are_refused(tmp_path: Path) -> None:
    dataset = open_split(DataConfig(train=(write_numbered(tmp_path / "a", 0, 100),), seq_length=8), "train", seed=1)
    with pytest.raises(ValueError, match="-1"):
        dataset.batch([-1])


def test_the_package_imports_without_torch() -> None:
    code = "import sys, megatron_7b.data; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
