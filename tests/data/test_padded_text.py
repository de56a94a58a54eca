"""Whole sentences and pairs of them: nothing is lost, documents stay apart, labels are true."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_7b.config.schema import DataConfig
from megatron_7b.data import IndexedDataset, IndexWriter
from megatron_7b.data.samples.framed_text import Frame, FramedTexts
from megatron_7b.data.samples.padded_text import PaddedTexts, Padding, truncate_pair
from megatron_7b.data.samples.sample_order import Reached
from megatron_7b.data.samples.sets import find_sets, whole_corpus
from megatron_7b.data.samples.whole_sentences import Cutting, Sentences, cut_documents
from megatron_7b.errors import ConfigError, DataFormatError

CLS, SEP, PAD, EOD = 60_000, 60_001, 60_002, 60_003
FRAME = Frame(cls_id=CLS, sep_id=SEP, pad_id=PAD)
NUM_DOCUMENTS = 60


def write_sentences(prefix: Path, documents: list[list[list[int]]]) -> str:
    writer = IndexWriter(str(prefix), 2)
    for document in documents:
        ids = np.array([token for sentence in document for token in sentence], dtype=np.int64)
        writer.add_document(ids, np.array([len(sentence) for sentence in document], dtype=np.int64))
    writer.finish()
    return str(prefix)


def counted_documents(num_documents: int, *, seed: int = 1) -> list[list[list[int]]]:
    """Every token of the corpus is another one, so that a text says where it is from; each document ends with EOD."""
    random, token, documents = np.random.default_rng(seed), 0, []
    for _ in range(num_documents):
        sentences = []
        for length in random.integers(3, 14, random.integers(1, 12)).tolist():
            sentences.append(list(range(token, token + length)))
            token += length
        sentences[-1].append(EOD)
        documents.append(sentences)
    return documents


DOCUMENTS = counted_documents(NUM_DOCUMENTS)
DOCUMENT_OF = {token: number for number, one in enumerate(DOCUMENTS) for sentence in one for token in sentence}
SENTENCE_STARTS = {sentence[0] for one in DOCUMENTS for sentence in one}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_sentences(tmp_path_factory.mktemp("sentences") / "a", DOCUMENTS)


def opened(
    prefix: str, reached: Reached | None = None, *, seed: int = 3, split: Any = "train", **how: Any
) -> PaddedTexts:
    config = DataConfig(train=(prefix,), split="80,20", seq_length=how.get("seq_length", 32))
    padding = Padding(**{"seq_length": 32, "eod_id": EOD, **how})
    return PaddedTexts(find_sets(config, "train"), padding, FRAME, seed=seed, reached=reached)


def texts_of(batch: FramedTexts, row: int) -> list[list[int]]:
    """The texts between the frames of a row, which is checked."""
    ids, length = batch.ids[row].tolist(), int(batch.lengths[row])
    assert ids[0] == CLS
    assert ids[length - 1] == SEP
    assert set(ids[length:]) <= {PAD}
    np.testing.assert_array_equal(batch.is_text[row], np.isin(batch.ids[row], [CLS, SEP, PAD], invert=True))
    inner = ids[1 : length - 1]
    if batch.tokentype_ids is None:
        return [inner]
    middle = inner.index(SEP)
    second = np.zeros(len(ids), dtype=np.int64)
    second[middle + 2 : length] = 1
    assert batch.tokentype_ids[row].tolist() == second.tolist()
    return [inner[:middle], inner[middle + 1 :]]


def test_an_epoch_of_single_texts_has_every_token_once(prefix: str) -> None:
    source = opened(prefix, short_share=0.3)
    batch = source.read(range(source.num_samples))
    texts = [texts_of(batch, row)[0] for row in range(source.num_samples)]
    kept = sorted(token for text in texts for token in text)
    expected = sorted(token for one in DOCUMENTS[:48] for sentence in one for token in sentence if token != EOD)
    assert kept == expected
    assert all(DOCUMENT_OF[text[0]] == DOCUMENT_OF[text[-1]] for text in texts)
    assert all(text[0] in SENTENCE_STARTS for text in texts)
    second = source.read(range(source.num_samples, 2 * source.num_samples))
    assert sorted(map(tuple, second.ids.tolist())) == sorted(map(tuple, batch.ids.tolist()))
    assert second.ids.tolist() != batch.ids.tolist()


def test_what_is_longer_than_a_sample_is_cut(prefix: str) -> None:
    source = opened(prefix, seq_length=7, short_share=0.0)
    texts = [texts_of(source.read([number]), 0)[0] for number in range(source.num_samples)]
    assert max(map(len, texts)) == 5
    left_out = (
        {token for one in DOCUMENTS[:48] for s in one for token in s} - {EOD} - {t for text in texts for t in text}
    )
    assert len(left_out) < 0.05 * sum(map(len, texts))  # pieces of a single token


@pytest.mark.parametrize("pairs", ["next_sentence", "sentence_order"])
def test_pairs_are_what_their_labels_say(prefix: str, pairs: Any) -> None:
    source = opened(prefix, pairs=pairs)
    count = 4 * source.num_samples
    batch = source.read(range(count))
    assert batch.pair_labels is not None
    assert abs(batch.pair_labels.mean() - 0.5) < 0.1
    for row, label in enumerate(batch.pair_labels.tolist()):
        first, second = texts_of(batch, row)
        assert first
        assert second
        assert EOD not in [*first, *second]
        same_document = DOCUMENT_OF[first[0]] == DOCUMENT_OF[second[0]]
        if pairs == "sentence_order":
            assert same_document
            assert (second[-1] < first[0]) == bool(label)
        else:
            assert same_document == (not label)
            assert label or first[-1] < second[0]
    lengths = batch.lengths[batch.pair_labels == 0].mean(), batch.lengths[batch.pair_labels == 1].mean()
    assert lengths[0] == pytest.approx(lengths[1], rel=0.15)  # a length must not give the class away


def test_a_number_is_all_the_state(prefix: str) -> None:
    one, again = (opened(prefix, pairs="next_sentence", texts_read=2) for _ in range(2))
    whole, part = one.read(range(50)), again.read([31, 7])
    np.testing.assert_array_equal(part.ids, whole.ids[[31, 7]])
    np.testing.assert_array_equal(whole.ids[::2], whole.ids[1::2])
    assert whole.versions.tolist()[:4] == [0, 1, 0, 1]
    assert (opened(prefix, pairs="next_sentence", seed=4).read(range(25)).ids != whole.ids[::2]).any()


def test_blends_continue_each_set_where_it_was(prefix: str, tmp_path: Path) -> None:
    other = write_sentences(tmp_path / "b", counted_documents(40, seed=2))
    config = DataConfig(train=("0.75", prefix, "0.25", other), split="1", seq_length=32, max_epochs=(2.0,))
    how = Padding(seq_length=32, pairs="sentence_order")
    blend = PaddedTexts(find_sets(config, "train"), how, FRAME, seed=3)
    sets = blend.read(range(40)).sets
    assert (sets == 0).sum() == 30
    assert blend.end == 2 * blend.num_samples
    with pytest.raises(ConfigError, match="all sets have run out"):
        blend.check_end(2 * blend.num_samples + 1)
    changed = replace(config, train=("0.5", prefix, "0.5", other))
    resumed = PaddedTexts(find_sets(changed, "train"), how, FRAME, seed=3, reached=Reached(40, blend.order))
    assert [one.consumed for one in resumed.order.sets] == [30, 10]
    numbers = [(int(s), int(n)) for batch in (blend.read(range(40)), resumed.read(range(40, 80)))
               for s, n in zip(batch.sets, batch.numbers, strict=True)]  # fmt: skip
    assert sorted(numbers) == [(0, n) for n in range(50)] + [(1, n) for n in range(30)]


@pytest.mark.parametrize("change", [{"pairs": "sentence_order"}, {"short_share": 0.5}, {"texts_read": 2}])
def test_other_samples_would_not_continue(prefix: str, change: dict[str, Any]) -> None:
    before = opened(prefix, pairs="next_sentence").order
    with pytest.raises(ConfigError, match="the kind of samples is"):
        opened(prefix, Reached(8, before), **{"pairs": "next_sentence", **change})


def test_a_corpus_without_sentences_is_refused(tmp_path: Path) -> None:
    whole = write_sentences(tmp_path / "a", [[sum(one, [])] for one in DOCUMENTS])  # noqa: RUF017
    with pytest.raises(ConfigError, match=r"(?s)are not divided into sentences.*--split-sentences"):
        opened(whole, pairs="sentence_order")
    assert opened(whole).num_samples > 0  # each document is a sentence
    alone = write_sentences(tmp_path / "b", DOCUMENTS[:1])
    with pytest.raises(DataFormatError, match="two documents of at least two sentences"):
        PaddedTexts(whole_corpus(alone), Padding(seq_length=32, pairs="next_sentence"), FRAME, seed=3)


def test_ids_beyond_the_vocabulary_are_refused(prefix: str) -> None:
    with pytest.raises(DataFormatError, match="outside a vocabulary of 10"):
        opened(prefix, vocab_size=10).read(range(8))


@given(
    lengths=st.lists(st.lists(st.integers(0, 20), max_size=8), min_size=1, max_size=8),
    room=st.integers(2, 30),
    short_share=st.sampled_from([0.0, 0.5, 1.0]),
    min_sentences=st.sampled_from([1, 2]),
)
def test_cuts(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[list[int]],
    room: int,
    short_share: float,
    min_sentences: int,
) -> None:
    """Against walking through each document: samples lie in one, in order, and leave out what they must."""
    documents = [[[1] * length for length in one] for one in lengths]
    dataset = IndexedDataset(write_sentences(tmp_path_factory.mktemp("c") / "a", documents))
    if dataset.num_tokens == 0:
        return
    how = Cutting(room=room, short_share=short_share, min_sentences=min_sentences, seed=1)
    cuts = cut_documents(Sentences(dataset), (0, len(documents)), how)
    spans = list(zip(cuts.begin.tolist(), (cuts.begin + cuts.length).tolist(), strict=True))
    expected, start = [], 0
    for one in lengths:
        ends = (start + np.cumsum(one)).tolist()
        place, number = start, 0
        while len(one) >= min_sentences and number < len(one) and place < start + sum(one):
            target = int(how.targets(np.array([place]))[0])
            fitting = [at for at in range(number, len(one)) if ends[at] - place <= target]
            last = fitting[-1] + 1 if fitting else number
            if min_sentences == 2:
                last = max(last, number + 2)
                last = len(one) if len(one) - last < 2 else last
                end = ends[last - 1]
            elif fitting and ends[last - 1] > place:
                end = ends[last - 1]
            else:
                long = next(at for at in range(number, len(one)) if ends[at] > place)
                end = min(ends[long], place + room)
                last = long + (end == ends[long])
            if end - place >= 2:
                expected.append((place, end))
            place, number = end, last
        start += sum(one)
    assert spans == expected


@given(first=st.integers(1, 40), second=st.integers(1, 40), room=st.integers(2, 30))
def test_truncation(first: int, second: int, room: int) -> None:
    a, b = np.arange(first), np.arange(second)
    short_a, short_b = truncate_pair(a, b, room, np.random.default_rng(1))
    assert len(short_a) + len(short_b) == min(room, first + second)
    assert min(len(short_a), len(short_b)) >= min(first, second, room // 2)
    assert short_a.tolist() == list(range(short_a[0], short_a[0] + len(short_a)))
