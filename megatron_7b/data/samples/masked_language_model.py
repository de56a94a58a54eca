"""Masked-language-model samples (BERT): some words are hidden, and the model is to tell them.

A sample is a window of the token stream between two special tokens, `[CLS] t1 … t(s-2) [SEP]`, read in the order and
with the blends of `open_split`; the global sample number is the whole state. What is hidden:

- Units are whole words, where the caller says which tokens begin one (`find_word_beginnings`); else single tokens.
- Spans of 1 to `max_ngram` neighbouring units are drawn, n with a probability proportional to 1/n, from random places,
  until `masked_share` of the window's tokens is hidden, rounded, at least one; never more. A span that would exceed the
  budget is shortened, one that overlaps another is drawn anew. Special tokens are never hidden.
- Each hidden token becomes the mask token in 80 %, any other token of the vocabulary in 10 %, and stays in 10 %.

Source: Devlin et al., "BERT", 2018; spans as in Megatron-LM's masked-language-model datasets.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megatron_7b.config.schema import DataConfig
from megatron_7b.data.samples.dataset import Batch, Dataset, DatasetPart
from megatron_7b.data.samples.opening import UNKNOWN_CONTENTS, open_split
from megatron_7b.data.samples.sample_order import Reached, SampleOrder
from megatron_7b.data.samples.sample_random import sample_generator
from megatron_7b.data.samples.split import Split
from megatron_7b.errors import ConfigError

NUM_FRAME_TOKENS = 2
"""[CLS] and [SEP]."""


@dataclass(frozen=True, kw_only=True)
class Masking:
    """How tokens are hidden."""

    mask_id: int
    """The mask token."""
    cls_id: int
    """First token of each sample."""
    sep_id: int
    """Last token of each sample."""
    vocab_size: int
    """Random tokens are drawn below this."""
    special_ids: frozenset[int] = frozenset()
    """Tokens that are neither hidden nor drawn, besides the three above."""
    begins_word: NDArray[np.bool_] | None = None
    """Whether a token begins a word, [vocab_size]; None: each token is a word."""
    masked_share: float = 0.15
    """Of the tokens that may be hidden."""
    max_ngram: int = 3
    """Longest span in words."""


class MaskedLanguageModelDataset:
    """Masked samples by global number."""

    def __init__(self, dataset: Dataset, masking: Masking, *, seed: int) -> None:
        """Mask the windows of a dataset.

        Args:
            dataset: With a sequence length two below that of the samples; see `open_masked_split`.
            masking: What to hide.
            seed: The run's.

        Raises:
            ConfigError: The masking is impossible.
        """
        _check_masking(masking)
        self.dataset = dataset
        self.masking = masking
        self.seq_length = dataset.seq_length + NUM_FRAME_TOKENS
        self._seed = seed
        self._never = np.zeros(masking.vocab_size, dtype=bool)
        self._never[[masking.mask_id, masking.cls_id, masking.sep_id, *masking.special_ids]] = True
        self._drawable = np.flatnonzero(~self._never)

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
        """Return the samples of these global numbers, in this order; each is a document of its own."""
        shape = (len(indices), self.seq_length)
        labels = np.empty(shape, dtype=np.int64)
        labels[:, 0], labels[:, -1] = self.masking.cls_id, self.masking.sep_id
        windows = self.dataset.batch(indices)
        labels[:, 1:-1] = windows.tokens
        is_text = np.zeros(shape, dtype=bool)
        is_text[:, 1:-1] = windows.loss_mask != 0  # what fills up the last window of a corpus is none
        tokens, loss_mask = labels.copy(), np.zeros(shape, dtype=np.float32)
        for row, index in enumerate(indices):
            generator = sample_generator(self._seed, "masked language model", int(index))
            hidden = self._draw_hidden(labels[row], is_text[row], generator)
            tokens[row, hidden] = self._replace(labels[row, hidden], generator)
            loss_mask[row, hidden] = 1.0
        num_rows, length = shape
        return Batch(
            tokens,
            labels,
            loss_mask,
            position_ids=np.tile(np.arange(length, dtype=np.int64), (num_rows, 1)),
            cu_seqlens=np.arange(num_rows + 1, dtype=np.int32) * length,
        )

    def _draw_hidden(
        self, ids: NDArray[np.int64], is_text: NDArray[np.bool_], generator: np.random.Generator
    ) -> NDArray[np.int64]:
        """Places to hide, [hidden], ascending."""
        text = np.where(is_text, ids, self.masking.sep_id)  # else a word could continue in what follows the text
        words = find_words(text, self.masking.begins_word, self._never)
        budget = max(1, round(self.masking.masked_share * sum(map(len, words)))) if words else 0
        weights = 1 / np.arange(1, self.masking.max_ngram + 1)
        lengths = generator.choice(len(weights), size=len(words), p=weights / weights.sum()) + 1
        is_hidden = np.zeros(len(words), dtype=bool)
        places: list[int] = []
        for first, length in zip(generator.permutation(len(words)).tolist(), lengths.tolist(), strict=True):
            span = list(range(first, min(first + length, len(words))))
            while span and len(places) + sum(len(words[word]) for word in span) > budget:
                span.pop()
            if span and not is_hidden[span].any():
                is_hidden[span] = True
                places += [place for word in span for place in words[word]]
            if len(places) == budget:
                break
        return np.array(sorted(places), dtype=np.int64)

    def _replace(self, ids: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.int64]:
        fate = generator.random(len(ids))
        others = generator.choice(self._drawable, size=len(ids))
        return np.where(fate < 0.8, self.masking.mask_id, np.where(fate < 0.9, others, ids))


def open_masked_split(
    config: DataConfig,
    split: Split,
    masking: Masking,
    *,
    seed: int,
    contents: Mapping[str, str] = UNKNOWN_CONTENTS,
    reached: Reached | None = None,
) -> MaskedLanguageModelDataset:
    """Return the masked samples of one split, of `config.seq_length` tokens with their frame.

    Args:
        config: The data section.
        split: Which one.
        masking: What to hide.
        seed: The run's.
        contents: As for `open_split`.
        reached: As for `open_split`.

    Raises:
        ConfigError: As for `open_split`; or the masking is impossible.
        DataFormatError: A file is damaged, too small, or holds ids outside of the vocabulary.
    """
    inner = windows_of_samples(config)
    dataset = open_split(inner, split, seed=seed, vocab_size=masking.vocab_size, contents=contents, reached=reached)
    return MaskedLanguageModelDataset(dataset, masking, seed=seed)


def windows_of_samples(config: DataConfig) -> DataConfig:
    """Return how the text within the frames of samples is read.

    Raises:
        ConfigError: There is no room for text.
    """
    if config.seq_length <= NUM_FRAME_TOKENS:
        raise ConfigError(f"data.seq_length is {config.seq_length}, expected room for [CLS], [SEP] and text")
    return replace(config, seq_length=config.seq_length - NUM_FRAME_TOKENS, eod_mask_loss=False, fim_rate=0.0)


def find_words(
    ids: NDArray[np.int64], begins_word: NDArray[np.bool_] | None, never: NDArray[np.bool_]
) -> list[list[int]]:
    """Return the places of each word among `ids`, [s]; tokens in `never`, [vocab_size], belong to none and end one."""
    words: list[list[int]] = []
    is_open = False
    for place, token in enumerate(ids.tolist()):
        if never[token]:
            is_open = False
        elif is_open and begins_word is not None and not begins_word[token]:
            words[-1].append(place)
        else:
            words.append([place])
            is_open = True
    return words


def find_word_beginnings(pieces: Iterable[str]) -> NDArray[np.bool_]:
    """Return which tokens begin a word, from their spelling in the vocabulary, in the order of their ids, [vocab_size].

    Knows WordPiece (`##` continues), SentencePiece (`▁` begins) and byte-level BPE (`Ġ`, `Ċ`, `ĉ` begin).
    """
    spelled = list(pieces)
    if any(piece.startswith("##") and len(piece) > 2 for piece in spelled):
        return np.array([not piece.startswith("##") for piece in spelled])
    return np.array([piece.startswith(("▁", "Ġ", "Ċ", "ĉ")) for piece in spelled])


def _check_masking(masking: Masking) -> None:
    ids = [masking.mask_id, masking.cls_id, masking.sep_id, *masking.special_ids]
    if not all(0 <= one < masking.vocab_size for one in ids):
        raise ConfigError(f"special ids {sorted(ids)} do not all lie in a vocabulary of {masking.vocab_size}")
    if len(set(ids)) >= masking.vocab_size:
        raise ConfigError(f"a vocabulary of {masking.vocab_size} with nothing but special tokens cannot be masked")
    if not 0 < masking.masked_share < 1 or masking.max_ngram < 1:
        raise ConfigError(
            f"masked_share is {masking.masked_share} and max_ngram {masking.max_ngram}",
            hint="masked_share lies between 0 and 1, and spans have at least one word",
        )
    if masking.begins_word is not None and len(masking.begins_word) != masking.vocab_size:
        raise ConfigError(
            f"begins_word has {len(masking.begins_word)} entries for a vocabulary of {masking.vocab_size}"
        )
