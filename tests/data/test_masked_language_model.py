"""Masked samples: the budget is kept, words are hidden whole, and the number of a sample is all it takes."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from megatron_7b.config.schema import DataConfig
from megatron_7b.data import Split, open_sequential, open_split
from megatron_7b.data.samples.framed_text import NUM_FRAME_TOKENS, Frame, FramedWindows
from megatron_7b.data.samples.masked_language_model import MaskedLanguageModelDataset
from megatron_7b.data.samples.masking import Masker, Masking, find_word_beginnings
from megatron_7b.errors import ConfigError
from megatron_7b.objective.masked import windows_of_samples
from tests.data.corpora import random_documents, write_corpus

VOCAB_SIZE, CLS, SEP, MASK, EOD = 1000, 996, 997, 998, 999
BEGINS_WORD = np.random.default_rng(9).random(VOCAB_SIZE) < 0.6


def masking(**changes: object) -> Masking:
    """A vocabulary with three special tokens and an end-of-document token at its end."""
    values: dict[str, object] = {
        "mask_id": MASK,
        "vocab_size": VOCAB_SIZE,
        "special_ids": frozenset({CLS, SEP, EOD}),
        "begins_word": BEGINS_WORD,
    }
    return Masking(**{**values, **changes})  # type: ignore[arg-type]


def masked_windows(
    config: DataConfig, how: Masking, *, seed: int, split: Split = "train"
) -> MaskedLanguageModelDataset:
    """What the objective opens for full samples."""
    inner = replace(config, seq_length=config.seq_length - NUM_FRAME_TOKENS)
    reads = how.masks_per_text
    windows = open_split(inner, split, seed=seed, reads_per_window=reads)
    frame = Frame(cls_id=CLS, sep_id=SEP)
    return MaskedLanguageModelDataset(FramedWindows(windows, frame, reads_per_window=reads), how, seed=seed)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    documents = [[*ids, EOD] for ids in random_documents(2, 300, max_length=60, vocab_size=CLS)]
    prefix = write_corpus(tmp_path_factory.mktemp("c") / "a", documents)
    return DataConfig(train=(prefix,), split="95,5", seq_length=64)


def reference_words(ids: NDArray[np.int64], begins: NDArray[np.bool_] | None) -> list[list[int]]:
    """Words by looking at each pair of neighbours."""
    special = np.isin(ids, [CLS, SEP, MASK, EOD])
    words: list[list[int]] = []
    for place in np.flatnonzero(~special).tolist():
        continues = place > 0 and not special[place - 1] and begins is not None and not begins[ids[place]]
        words = [*words[:-1], [*words[-1], place]] if continues else [*words, [place]]
    return words


@pytest.mark.parametrize("whole_words", [True, False])
@pytest.mark.parametrize("max_ngram", [1, 3])
def test_what_is_hidden(config: DataConfig, whole_words: bool, max_ngram: int) -> None:
    begins = BEGINS_WORD if whole_words else None
    how = masking(begins_word=begins, max_ngram=max_ngram)
    dataset = masked_windows(config, how, seed=3)
    batch = dataset.batch(range(dataset.num_samples))
    plain = open_split(DataConfig(train=config.train, split="95,5", seq_length=62), "train", seed=3)
    np.testing.assert_array_equal(batch.labels[:, 1:-1], plain.batch(range(dataset.num_samples)).tokens)
    assert (batch.labels[:, 0] == CLS).all()
    assert (batch.labels[:, -1] == SEP).all()
    hidden = batch.loss_mask == 1
    np.testing.assert_array_equal(batch.tokens[~hidden], batch.labels[~hidden])
    assert not np.isin(batch.labels[hidden], [CLS, SEP, MASK, EOD]).any()
    runs = []
    for ids, row in zip(batch.labels, hidden, strict=True):
        words = reference_words(ids, begins)
        budget = max(1, round(0.15 * sum(map(len, words))))
        # Whole words cannot always add up to the budget; single tokens always do.
        assert budget - (max(map(len, words)) - 1) <= row.sum() <= budget
        assert all(row[word].all() or not row[word].any() for word in words)
        of_words = np.array([row[word[0]] for word in words])
        runs += [len(run) for run in np.split(of_words, np.flatnonzero(np.diff(of_words)) + 1) if run[0]]
    # Spans of a third, longer ones; neighbours that were drawn apart make some of two units too.
    assert (np.mean(runs) > 1.5) == (max_ngram == 3)


def test_what_stands_in_their_place(config: DataConfig) -> None:
    dataset = masked_windows(config, masking(), seed=3)
    batch = dataset.batch(range(20 * dataset.num_samples))
    hidden = batch.loss_mask == 1
    shown, truth = batch.tokens[hidden], batch.labels[hidden]
    assert abs((shown == MASK).mean() - 0.8) < 0.01
    assert abs((shown == truth).mean() - 0.1) < 0.01
    drawn = shown[(shown != MASK) & (shown != truth)]
    assert abs(len(drawn) / len(shown) - 0.1) < 0.01
    assert not np.isin(drawn, [CLS, SEP, EOD]).any()
    assert drawn.min() < 20
    assert drawn.max() > CLS - 20


def test_a_number_is_all_the_state(config: DataConfig) -> None:
    first, again = (masked_windows(config, masking(), seed=3) for _ in range(2))
    whole = first.batch(range(40))
    part = again.batch([17, 3])
    np.testing.assert_array_equal(part.tokens, whole.tokens[[17, 3]])
    np.testing.assert_array_equal(part.loss_mask, whole.loss_mask[[17, 3]])
    other = masked_windows(config, masking(), seed=4).batch(range(40))
    assert (other.loss_mask != whole.loss_mask).any()


def test_shapes_are_those_of_the_model(config: DataConfig) -> None:
    batch = masked_windows(config, masking(), seed=3, split="valid").batch([0, 1, 2])
    arrays = (batch.tokens, batch.labels, batch.loss_mask, batch.position_ids)
    assert {array.shape for array in arrays} == {(3, 64)}
    assert [str(array.dtype) for array in arrays] == ["int64", "int64", "float32", "int64"]
    assert batch.position_ids.tolist() == [list(range(64))] * 3
    assert batch.cu_seqlens is not None
    assert batch.cu_seqlens.tolist() == [0, 64, 128, 192]


@pytest.mark.parametrize("continues", [True, False])
def test_what_fills_up_the_last_window_is_never_hidden(config: DataConfig, continues: bool) -> None:
    """A corpus in the order of the file: token 0 stands behind its end; it is no text, and continues no word."""
    begins = np.random.default_rng(9).random(VOCAB_SIZE) < 0.3
    begins[0] = not continues
    for seq_length in range(20, 60):
        windows = open_sequential(config.train[0], seq_length=seq_length)
        framed = FramedWindows(windows, Frame(cls_id=CLS, sep_id=SEP))
        samples = MaskedLanguageModelDataset(framed, masking(masked_share=0.9, begins_word=begins), seed=3)
        last = samples.num_samples - 1
        batch = samples.batch([last, last + 1])
        end_of_text = 1 + int(windows.batch([last]).loss_mask.sum())
        assert batch.loss_mask[0, :end_of_text].any()
        assert not batch.loss_mask[0, end_of_text:].any()
        assert not batch.loss_mask[1].any()


@given(ids=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=40), whole=st.booleans())
def test_words(ids: list[int], whole: bool) -> None:
    begins = BEGINS_WORD if whole else None
    array = np.array(ids, dtype=np.int64)
    words = Masker(masking(begins_word=begins)).words(array, np.ones(len(ids), dtype=bool))
    found = [list(range(first, first + size)) for first, size in zip(*words, strict=True)]
    assert found == reference_words(array, begins)


def test_the_masks_of_a_text_share_no_word(config: DataConfig) -> None:
    dataset = masked_windows(config, masking(masks_per_text=3), seed=3)
    plain = masked_windows(config, masking(), seed=3)
    assert dataset.num_samples == 3 * plain.num_samples
    batch = dataset.batch(range(dataset.num_samples))
    texts = batch.labels.reshape(-1, 3, 64)
    np.testing.assert_array_equal(texts, np.repeat(plain.batch(range(plain.num_samples)).labels[:, None], 3, axis=1))
    hidden = batch.loss_mask.reshape(-1, 3, 64)
    assert hidden.sum(axis=1).max() == 1
    shares = hidden.sum(axis=2) / np.isin(texts, [CLS, SEP, MASK, EOD], invert=True).sum(axis=2)
    np.testing.assert_allclose(shares.mean(axis=0), 0.15, atol=0.02)
    again = masked_windows(config, masking(masks_per_text=3), seed=3).batch([7])
    np.testing.assert_array_equal(again.tokens[0], batch.tokens[7])


def test_the_word_before_each_span(config: DataConfig) -> None:
    batch = masked_windows(config, masking(with_word_before=True), seed=3).batch(range(60))
    plain = masked_windows(config, masking(), seed=3).batch(range(60))
    np.testing.assert_array_equal(batch.tokens, plain.tokens)
    assert batch.is_word_before is not None
    np.testing.assert_array_equal((batch.loss_mask == 1) & ~batch.is_word_before, plain.loss_mask == 1)
    for ids, hidden, before in zip(batch.labels, plain.loss_mask == 1, batch.is_word_before, strict=True):
        words = reference_words(ids, BEGINS_WORD)
        expected = [
            one for one, after in itertools.pairwise(words)
            if hidden[after[0]] and not hidden[one[0]] and one[-1] + 1 == after[0]
        ]  # fmt: skip
        assert np.flatnonzero(before).tolist() == [place for word in expected for place in word]
    assert batch.is_word_before.any()


def test_word_beginnings() -> None:
    assert find_word_beginnings(["[CLS]", "play", "##ing", "##", "."]).tolist() == [True, True, False, False, True]
    assert find_word_beginnings(["Ġplay", "ing", "Ċ", "▁a"]).tolist() == [True, False, True, True]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mask_id": VOCAB_SIZE}, "do not all lie"),
        ({"masks_per_text": 0}, "masks_per_text"),
        ({"masked_share": 0.0}, "masked_share"),
        ({"max_ngram": 0}, "max_ngram"),
        ({"begins_word": BEGINS_WORD[:5]}, "5 entries"),
        ({"vocab_size": 4, "mask_id": 0, "special_ids": frozenset({1, 2, 3})}, "nothing but"),
    ],
)
def test_impossible_masking(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Masker(masking(**changes))


def test_no_room_for_text() -> None:
    with pytest.raises(ConfigError, match="expected room"):
        windows_of_samples(DataConfig(seq_length=2))
