"""Span corruption: the text can be put together again from both sides, and lengths are always the same."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_7b.config.schema import DataConfig
from megatron_7b.data import open_sequential, open_split
from megatron_7b.data.samples.sample_random import sample_generator
from megatron_7b.data.samples.span_corruption import (
    Corruption,
    Lengths,
    SpanCorruptionDataset,
    draw_noise,
    fit_lengths,
    open_corrupted_split,
    plan_lengths,
)
from megatron_7b.errors import ConfigError
from tests.data.corpora import random_documents, write_corpus

EOS, START = 2000, 2001
CORRUPTION = Corruption(sentinel_ids=tuple(range(3000, 3100)), eos_id=EOS, start_id=START)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    prefix = write_corpus(tmp_path_factory.mktemp("c") / "a", random_documents(2, 300, max_length=60))
    return DataConfig(train=(prefix,), split="95,5", seq_length=64)


def split_at_sentinels(ids: list[int]) -> list[list[int]]:
    """What stands before the first sentinel, and after each; sentinels must come in their order."""
    places = [place for place, token in enumerate(ids) if token >= 3000]
    assert [ids[place] for place in places] == list(range(3000, 3000 + len(places)))
    return [ids[: places[0]], *(ids[a + 1 : b] for a, b in pairwise([*places, len(ids)]))]


def test_both_sides_give_the_text(config: DataConfig) -> None:
    dataset = open_corrupted_split(config, "train", CORRUPTION, seed=5)
    lengths = dataset.lengths
    batch = dataset.batch(range(dataset.num_samples))
    texts = (
        open_split(replace(config, seq_length=lengths.raw), "train", seed=5).batch(range(dataset.num_samples)).tokens
    )
    for text, encoder, labels in zip(texts, batch.tokens, batch.labels, strict=True):
        assert (encoder[-1], labels[-1]) == (EOS, EOS)
        kept, lost = split_at_sentinels(encoder[:-1].tolist()), split_at_sentinels(labels[:-1].tolist())
        assert len(kept) == len(lost) == lengths.spans + 1
        assert lost[0] == kept[-1] == []  # Text comes first, a span last.
        assert all(kept[:-1])
        assert all(lost[1:])
        rebuilt = [token for text, span in zip(kept, lost[1:], strict=False) for token in (*text, *span)]
        assert rebuilt == text.tolist()
    assert batch.attention_mask is None
    assert batch.decoder_tokens is not None
    np.testing.assert_array_equal(batch.decoder_tokens[:, 1:], batch.labels[:, :-1])
    assert (batch.decoder_tokens[:, 0] == START).all()


def test_shapes_are_always_the_same(config: DataConfig) -> None:
    dataset = open_corrupted_split(config, "valid", CORRUPTION, seed=5)
    batch = dataset.batch(range(7))
    assert batch.tokens.shape == (7, dataset.lengths.encoder)
    assert batch.decoder_tokens is not None
    assert batch.decoder_tokens.shape == batch.labels.shape == batch.loss_mask.shape == (7, dataset.lengths.decoder)
    assert batch.loss_mask.all()
    assert dataset.lengths.encoder == 64


def test_a_number_is_all_the_state(config: DataConfig) -> None:
    first, again = (open_corrupted_split(config, "train", CORRUPTION, seed=5) for _ in range(2))
    whole = first.batch(range(40))
    np.testing.assert_array_equal(again.batch([31, 2]).labels, whole.labels[[31, 2]])
    assert (open_corrupted_split(config, "train", CORRUPTION, seed=6).batch(range(40)).labels != whole.labels).any()


@given(raw=st.integers(2, 600), density=st.floats(0.01, 0.9), mean=st.floats(1, 10), index=st.integers(0, 2**60))
def test_noise_has_the_planned_tokens_and_spans(raw: int, density: float, mean: float, index: int) -> None:
    how = replace(CORRUPTION, noise_density=density, mean_span_length=mean)
    lengths = plan_lengths(raw, how)
    is_noise = draw_noise(lengths, sample_generator(1, "test", index))
    assert len(is_noise) == raw
    assert is_noise.sum() == lengths.noise
    assert not is_noise[0]
    assert (np.diff(is_noise.astype(int)) == 1).sum() == lengths.spans
    assert abs(lengths.noise - raw * density) <= max(1, raw * density - (raw - 1))


def test_spans_are_cut_in_all_ways_alike() -> None:
    """Four tokens in two spans: three ways, and as many for the text between them."""
    lengths = Lengths(raw=8, noise=4, spans=2)
    seen: dict[bytes, int] = {}
    for index in range(4500):
        noise = draw_noise(lengths, sample_generator(1, "test", index)).tobytes()
        seen[noise] = seen.get(noise, 0) + 1
    assert len(seen) == 9
    assert min(seen.values()) > 400


@given(encoder=st.integers(4, 600), density=st.floats(0.05, 0.6), mean=st.floats(1, 8))
def test_the_longest_window_that_fits(encoder: int, density: float, mean: float) -> None:
    how = replace(CORRUPTION, noise_density=density, mean_span_length=mean, sentinel_ids=tuple(range(3000, 4000)))
    lengths = fit_lengths(encoder, how)
    assert lengths.encoder <= encoder
    assert all(plan_lengths(raw, how).encoder > encoder for raw in range(lengths.raw + 1, 3 * encoder + 20))


def test_the_usual_lengths() -> None:
    """T5's own: 512 tokens hold 568 of text with 85 replaced in 28 spans, and 114 labels."""
    lengths = fit_lengths(512, CORRUPTION)
    assert (lengths.raw, lengths.noise, lengths.spans, lengths.encoder, lengths.decoder) == (568, 85, 28, 512, 114)


@pytest.mark.parametrize(
    ("changes", "encoder", "words"),
    [
        ({"sentinel_ids": (3000, 3001)}, 64, "3 spans, but there are 2 sentinels"),
        ({}, 2, "no room"),
    ],
)
def test_impossible_corruption(changes: dict[str, Any], encoder: int, words: str, config: DataConfig) -> None:
    with pytest.raises(ConfigError, match=words):
        open_corrupted_split(replace(config, seq_length=encoder), "train", replace(CORRUPTION, **changes), seed=5)


def test_the_end_of_a_corpus_is_filled_up(config: DataConfig) -> None:
    """Evaluation reads to the last token that is followed by another, and what follows counts nowhere."""
    windows = open_sequential(config.train[0], seq_length=71)
    dataset = SpanCorruptionDataset(windows, CORRUPTION, seed=5)
    last = dataset.num_samples - 1
    batch, text = dataset.batch([last - 1, last, last + 1]), windows.batch([last])
    num_tokens = int(text.loss_mask.sum()) + 1
    lengths = plan_lengths(num_tokens, CORRUPTION)
    assert batch.attention_mask is not None
    assert batch.attention_mask.sum(axis=1).tolist() == [dataset.lengths.encoder, lengths.encoder, 1]
    assert batch.loss_mask.sum(axis=1).tolist() == [dataset.lengths.decoder, lengths.decoder, 0]
    kept = split_at_sentinels(batch.tokens[1, : lengths.encoder - 1].tolist())
    lost = split_at_sentinels(batch.labels[1, : lengths.decoder - 1].tolist())
    rebuilt = [token for text, span in zip(kept, lost[1:], strict=False) for token in (*text, *span)]
    assert rebuilt == text.tokens[0, :num_tokens].tolist()
