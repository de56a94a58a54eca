"""Span-corruption samples (T5): spans of text are replaced by sentinels, and the decoder writes what stood there.

    text     Thank you for inviting me to your party last week
    encoder  Thank you <0> me to your party <1> week <eos>
    decoder  <start> <0> for inviting <1> last           labels  <0> for inviting <1> last <eos>

A window of `raw_length` tokens of the stream loses `noise_density` of its tokens, in spans of `mean_span_length` on
average; how many tokens and spans that are is rounded once, so all samples have the same lengths and nothing is padded.
Text and spans alternate, text first; both are cut into their pieces at random, all ways with the same probability.

Source: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", 2020.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megatron_7b.config.schema import DataConfig
from megatron_7b.data.samples.dataset import Dataset
from megatron_7b.data.samples.opening import open_split
from megatron_7b.data.samples.sample_random import sample_generator
from megatron_7b.data.samples.split import Split
from megatron_7b.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Corruption:
    """How text is corrupted."""

    sentinel_ids: tuple[int, ...]
    """Tokens that stand for the first, second, … span."""
    eos_id: int
    """Last token of the encoder's input and of the labels."""
    start_id: int
    """First token of the decoder's input (T5 takes the padding token)."""
    noise_density: float = 0.15
    """Share of the text that is replaced."""
    mean_span_length: float = 3.0
    """Tokens of a span, on average."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of a sample: all samples have the same."""

    raw: int
    """Of the window of text."""
    noise: int
    """That are replaced."""
    spans: int
    """That they form."""

    @property
    def encoder(self) -> int:
        """Of the encoder's input, s_e: text, sentinels, end."""
        return self.raw - self.noise + self.spans + 1

    @property
    def decoder(self) -> int:
        """Of the decoder's input and of the labels, s_d: sentinels, replaced text, start or end."""
        return self.noise + self.spans + 1


def plan_lengths(raw: int, corruption: Corruption) -> Lengths:
    """What becomes of a window of `raw` tokens, at least 2 of which one stays."""
    noise = min(max(round(raw * corruption.noise_density), 1), raw - 1)
    spans = min(max(round(noise / corruption.mean_span_length), 1), noise, raw - noise)
    return Lengths(raw, noise, spans)


def fit_lengths(encoder_seq_length: int, corruption: Corruption) -> Lengths:
    """The longest window whose corrupted text fits the encoder.

    Raises:
        ConfigError: The encoder is too short for any, the rates are impossible, or the sentinels are too few.
    """
    if not 0 < corruption.noise_density < 1 or corruption.mean_span_length < 1:
        raise ConfigError(
            f"noise_density is {corruption.noise_density} and mean_span_length {corruption.mean_span_length}",
            hint="a density lies between 0 and 1, and spans have at least one token",
        )
    fitting = None
    # Rounding makes steps: the encoder's length may stay, or fall by one, where the window grows by one.
    for raw in range(2, int(encoder_seq_length / (1 - corruption.noise_density)) + 3):
        lengths = plan_lengths(raw, corruption)
        fitting = lengths if lengths.encoder <= encoder_seq_length else fitting
    if fitting is None:
        raise ConfigError(f"an encoder of {encoder_seq_length} tokens has no room for text, a sentinel and an end")
    if fitting.spans > len(corruption.sentinel_ids):
        raise ConfigError(
            f"samples have {fitting.spans} spans, but there are {len(corruption.sentinel_ids)} sentinels",
            hint="add sentinel tokens, or take a greater mean_span_length",
        )
    return fitting


@dataclass(frozen=True)
class SpanBatch:
    """One microbatch, as megatron-core's T5Model takes it."""

    encoder_tokens: NDArray[np.int64]
    """[b, s_e]."""
    decoder_tokens: NDArray[np.int64]
    """[b, s_d]."""
    labels: NDArray[np.int64]
    """The token after each of the decoder's, [b, s_d]."""
    loss_mask: NDArray[np.float32]
    """1 everywhere: nothing is padded, [b, s_d]."""


class SpanCorruptionDataset:
    """Corrupted samples by global number."""

    def __init__(self, dataset: Dataset, corruption: Corruption, *, seed: int) -> None:
        """Corrupt the windows of a dataset: its sequence length is that of the windows; see `open_corrupted_split`."""
        self.dataset = dataset
        self.corruption = corruption
        self.lengths = plan_lengths(dataset.seq_length, corruption)
        self._seed = seed

    @property
    def num_samples(self) -> int:
        """Samples of one epoch."""
        return self.dataset.num_samples

    @cached_property
    def _sentinels(self) -> NDArray[np.int64]:
        return np.array(self.corruption.sentinel_ids[: self.lengths.spans], dtype=np.int64)

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> SpanBatch:
        """The samples of these global numbers, in this order."""
        texts = self.dataset.batch(indices).tokens
        num_rows, lengths = len(indices), self.lengths
        encoder = np.full((num_rows, lengths.encoder), self.corruption.eos_id, dtype=np.int64)
        labels = np.full((num_rows, lengths.decoder), self.corruption.eos_id, dtype=np.int64)
        for row, index in enumerate(indices):
            is_noise = draw_noise(lengths, sample_generator(self._seed, "span corruption", int(index)))
            begins = is_noise & ~np.concatenate([[False], is_noise[:-1]])
            places = np.flatnonzero(begins)
            # A sentinel stands where its span began: for the encoder in place of it, for the decoder before it.
            encoder[row, :-1] = np.where(is_noise, self._spread(places), texts[row])[~is_noise | begins]
            in_noise = np.cumsum(is_noise)[places] - 1
            labels[row, :-1] = np.insert(texts[row][is_noise], in_noise, self._sentinels)
        decoder = np.roll(labels, 1, axis=1)
        decoder[:, 0] = self.corruption.start_id
        return SpanBatch(encoder, decoder, labels, np.ones(labels.shape, dtype=np.float32))

    def _spread(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The sentinels at these places of a window, [raw]."""
        spread = np.zeros(self.lengths.raw, dtype=np.int64)
        spread[places] = self._sentinels
        return spread


def open_corrupted_split(
    config: DataConfig, split: Split, corruption: Corruption, *, seed: int, vocab_size: int | None = None
) -> SpanCorruptionDataset:
    """The corrupted samples of one split, whose encoder takes at most `config.seq_length` tokens.

    Raises:
        ConfigError: As for `open_split` and `fit_lengths`.
        DataFormatError: A file is damaged, too small, or holds ids outside of the vocabulary.
    """
    lengths = fit_lengths(config.seq_length, corruption)
    inner = replace(config, seq_length=lengths.raw, eod_mask_loss=False, fim_rate=0.0)
    return SpanCorruptionDataset(open_split(inner, split, seed=seed, vocab_size=vocab_size), corruption, seed=seed)


def draw_noise(lengths: Lengths, generator: np.random.Generator) -> NDArray[np.bool_]:
    """Which tokens of a window are replaced, [raw]: text and spans in turn, text first."""
    text = _cut(lengths.raw - lengths.noise, lengths.spans, generator)
    spans = _cut(lengths.noise, lengths.spans, generator)
    runs = np.stack([text, spans], axis=1).ravel()
    return np.repeat(np.tile([False, True], lengths.spans), runs)


def _cut(total: int, pieces: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Lengths of `pieces` runs of at least one that add up to `total`, all ways with the same probability."""
    cuts = np.sort(generator.choice(total - 1, size=pieces - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))
