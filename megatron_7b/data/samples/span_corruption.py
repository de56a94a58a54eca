"""Span-corruption samples (T5): spans of text are replaced by sentinels, and the decoder writes what was there.

    text     Thank you for inviting me to your party last week
    encoder  Thank you <0> me to your party <1> week <eos>
    decoder  <start> <0> for inviting <1> last           labels  <0> for inviting <1> last <eos>

A window of `raw` tokens of the stream loses `noise_density` of its tokens, in spans of `mean_span_length` on average;
how many tokens and spans that are is rounded once, so all samples have the same lengths and nothing is padded, except
where a corpus ends within a window. Text and spans alternate, text first; both are cut into their pieces at random, all
ways with the same probability.

Source: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", 2020.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megatron_7b.config.schema import DataConfig, ObjectiveConfig
from megatron_7b.data.samples.dataset import Batch, Dataset, DatasetPart
from megatron_7b.data.samples.opening import UNKNOWN_CONTENTS, open_split
from megatron_7b.data.samples.sample_order import Reached, SampleOrder
from megatron_7b.data.samples.sample_random import sample_generator
from megatron_7b.data.samples.split import Split
from megatron_7b.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Corruption:
    """How text is corrupted."""

    sentinel_ids: tuple[int, ...]
    """Tokens that mark the first, second, … span."""
    eos_id: int
    """Last token of the encoder's input and of the labels."""
    start_id: int
    """First token of the decoder's input, and what fills up both; T5 takes the padding token."""
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
        """Of the encoder's input, s: text, sentinels, end."""
        return self.raw - self.noise + self.spans + 1

    @property
    def decoder(self) -> int:
        """Of the decoder's input and of the labels, s_d: sentinels, replaced text, start or end."""
        return self.noise + self.spans + 1


def plan_lengths(raw: int, how: Corruption | ObjectiveConfig) -> Lengths:
    """Return what becomes of a window of `raw` tokens, at least 2 of which one stays."""
    noise = min(max(round(raw * how.noise_density), 1), raw - 1)
    spans = min(max(round(noise / how.mean_span_length), 1), noise, raw - noise)
    return Lengths(raw, noise, spans)


def fit_lengths(encoder_seq_length: int, how: Corruption | ObjectiveConfig) -> Lengths:
    """Return the longest window whose corrupted text fits the encoder.

    Raises:
        ConfigError: The encoder is too short for any.
    """
    fitting = None
    # Rounding makes steps: the encoder's length may stay, or fall by one, where the window grows by one.
    for raw in range(2, int(encoder_seq_length / (1 - how.noise_density)) + 3):
        lengths = plan_lengths(raw, how)
        fitting = lengths if lengths.encoder <= encoder_seq_length else fitting
    if fitting is None:
        raise ConfigError(f"an encoder of {encoder_seq_length} tokens has no room for text, a sentinel and an end")
    return fitting


class SpanCorruptionDataset:
    """Corrupted samples by global number."""

    def __init__(self, dataset: Dataset, corruption: Corruption, *, seed: int) -> None:
        """Corrupt the windows of a dataset.

        Args:
            dataset: Its sequence length is that of the windows; see `open_corrupted_split`.
            corruption: What is put in the place of spans.
            seed: The run's.

        Raises:
            ConfigError: There are fewer sentinels than spans.
        """
        self.dataset = dataset
        self.corruption = corruption
        self.lengths = plan_lengths(dataset.seq_length, corruption)
        if self.lengths.spans > len(corruption.sentinel_ids):
            raise ConfigError(
                f"samples have {self.lengths.spans} spans, but there are {len(corruption.sentinel_ids)} sentinels"
            )
        self._sentinels = np.array(corruption.sentinel_ids, dtype=np.int64)
        self._seed = seed

    @property
    def num_samples(self) -> int:
        """Samples of one epoch."""
        return self.dataset.num_samples

    @property
    def parts(self) -> tuple[DatasetPart, ...]:
        """The sets of the windows."""
        return self.dataset.parts

    @property
    def order(self) -> SampleOrder:
        """The order of the windows."""
        return self.dataset.order

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about how the windows continue what a run has read."""
        return self.dataset.notes

    @property
    def left_out(self) -> tuple[str, ...]:
        """Sets with too little text for one window."""
        return self.dataset.left_out

    def check_end(self, num_samples: int) -> None:
        """Refuse a run that is longer than its data; see `Dataset.check_end`."""
        self.dataset.check_end(num_samples)

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> Batch:
        """Return the samples of these global numbers, in this order."""
        windows = self.dataset.batch(indices)
        plans = [self._plan(int(labels)) for labels in (windows.loss_mask != 0).sum(axis=1)]
        encoder, labels = (
            np.full((len(plans), length), self.corruption.start_id, dtype=np.int64)
            for length in (max(plan.encoder for plan in plans), max(plan.decoder for plan in plans))
        )
        for row, (index, plan) in enumerate(zip(indices, plans, strict=True)):
            text = windows.tokens[row, : plan.raw]
            generator = sample_generator(self._seed, "span corruption", int(index))
            encoder[row, : plan.encoder], labels[row, : plan.decoder] = self._corrupt(text, plan, generator)
        decoder = np.roll(labels, 1, axis=1)
        decoder[:, 0] = self.corruption.start_id
        is_text = _first(encoder.shape, [plan.encoder for plan in plans])
        is_answer = _first(labels.shape, [plan.decoder if plan.raw else 0 for plan in plans])
        return Batch(
            encoder,
            labels,
            is_answer.astype(np.float32),
            position_ids=np.tile(np.arange(encoder.shape[1], dtype=np.int64), (len(plans), 1)),
            decoder_tokens=decoder,
            attention_mask=None if is_text.all() else is_text,
        )

    def _plan(self, num_labels: int) -> Lengths:
        """Plan a window by how many of its tokens are followed by another one."""
        raw = self.lengths.raw
        if num_labels == raw:
            return self.lengths
        # The corpus ends within the window: after the last token that is followed by another comes one more.
        return plan_lengths(num_labels + 1, self.corruption) if num_labels else Lengths(0, 0, 0)

    def _corrupt(
        self, text: NDArray[np.int64], lengths: Lengths, generator: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return what the encoder reads of a text [raw], and the labels; of no text, only their ends."""
        eos = self.corruption.eos_id
        if not lengths.raw:
            return np.array([eos]), np.array([eos])
        is_noise = draw_noise(lengths, generator)
        begins = is_noise & ~np.concatenate([[False], is_noise[:-1]])
        places, sentinels = np.flatnonzero(begins), self._sentinels[: lengths.spans]
        # A sentinel is where its span began: for the encoder in place of it, for the decoder before it.
        spread = text.copy()
        spread[places] = sentinels
        before = np.cumsum(is_noise)[places] - 1
        answer = np.insert(text[is_noise], before, sentinels)
        return np.append(spread[~is_noise | begins], eos), np.append(answer, eos)


def open_corrupted_split(
    config: DataConfig,
    split: Split,
    corruption: Corruption,
    *,
    seed: int,
    vocab_size: int | None = None,
    contents: Mapping[str, str] = UNKNOWN_CONTENTS,
    reached: Reached | None = None,
) -> SpanCorruptionDataset:
    """Return the corrupted samples of one split, whose encoder takes at most `config.seq_length` tokens.

    Args:
        config: The data section.
        split: Which one.
        corruption: How text is corrupted.
        seed: The run's.
        vocab_size: As for `open_split`.
        contents: As for `open_split`.
        reached: As for `open_split`.

    Raises:
        ConfigError: As for `open_split` and `fit_lengths`; or there are fewer sentinels than spans.
        DataFormatError: A file is damaged, too small, or holds ids outside of the vocabulary.
    """
    inner = windows_of_samples(config, corruption)
    dataset = open_split(inner, split, seed=seed, vocab_size=vocab_size, contents=contents, reached=reached)
    return SpanCorruptionDataset(dataset, corruption, seed=seed)


def windows_of_samples(config: DataConfig, how: Corruption | ObjectiveConfig) -> DataConfig:
    """Return how the text of samples is read.

    Raises:
        ConfigError: As for `fit_lengths`.
    """
    return replace(config, seq_length=fit_lengths(config.seq_length, how).raw, eod_mask_loss=False, fim_rate=0.0)


def draw_noise(lengths: Lengths, generator: np.random.Generator) -> NDArray[np.bool_]:
    """Return which tokens of a window are replaced, [raw]: text and spans in turn, text first."""
    text = _cut(lengths.raw - lengths.noise, lengths.spans, generator)
    spans = _cut(lengths.noise, lengths.spans, generator)
    runs = np.stack([text, spans], axis=1).ravel()
    return np.repeat(np.tile([False, True], lengths.spans), runs)


def _cut(total: int, pieces: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Lengths of `pieces` runs of at least one that add up to `total`, all ways with the same probability."""
    cuts = np.sort(generator.choice(total - 1, size=pieces - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def _first(shape: tuple[int, ...], counts: Sequence[int]) -> NDArray[np.bool_]:
    """Return which places [b, s] are among the first ones of their rows, as many as counted."""
    return np.arange(shape[1]) < np.array(counts)[:, None]
