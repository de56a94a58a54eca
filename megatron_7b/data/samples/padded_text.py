"""Whole sentences of one document between [CLS] and [SEP], or pairs of such texts, filled up with padding.

    one text  [CLS] a1 … aN [SEP] [PAD] …              types 0 … 0
    a pair    [CLS] a1 … aN [SEP] b1 … bM [SEP] [PAD] …       0 … 0 1 … 1, padding 0

How documents are cut into samples is said in `whole_sentences`. The samples of an epoch are shuffled; those of a blend
take turns as windows do. A pair is made of one sample, of at least two sentences:

- sentence_order: it is divided between two of its sentences, and in half of all pairs the parts change places.
- next_sentence: it is divided in the same way, and in half of all pairs the second part is left out for sentences of
  another document of the same set, from a random one on and as many as fit. What was left out is read when the same
  sample is drawn otherwise, in another epoch.

A pair that does not fit loses tokens of its longer text, at either end, until both are of a length or it fits.
All of it is a function of the seed, the set and the number of the text within it.

Source: Devlin et al., "BERT", 2018, and Lan et al., "ALBERT", 2019; divisions and truncation as in BERT's
create_pretraining_data.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_7b.data._index import Permutation
from megatron_7b.data.samples.dataset import NumberedSamples
from megatron_7b.data.samples.framed_text import NUM_FRAME_TOKENS, Frame, FramedTexts
from megatron_7b.data.samples.sample_order import Reached
from megatron_7b.data.samples.sample_random import sample_generator
from megatron_7b.data.samples.sampling import stream_key
from megatron_7b.data.samples.sets import UNKNOWN_CONTENTS, OpenedSet, Source, parts_of
from megatron_7b.data.samples.split import Split
from megatron_7b.data.samples.whole_sentences import Cuts, Cutting, Sentences, cut_documents
from megatron_7b.errors import ConfigError, DataFormatError

type SentencePairs = Literal["none", "next_sentence", "sentence_order"]


@dataclass(frozen=True, kw_only=True)
class Padding:
    """How texts become samples.

    Attributes:
        seq_length: Tokens of a sample, frame and padding included.
        pairs: What the two texts of a sample are to one another; none: it is a single one.
        short_share: Share of the samples that are of a random length.
        texts_read: Samples in a row of a set that hold the same text.
        vocab_size: Ids are checked against it; None: unchecked.
        eod_id: Dropped at the end of documents, where it would tell the second text of a pair.
    """

    seq_length: int
    pairs: SentencePairs = "none"
    short_share: float = 0.1
    texts_read: int = 1
    vocab_size: int | None = None
    eod_id: int | None = None

    @property
    def room(self) -> int:
        """Tokens of text that a sample holds."""
        return self.seq_length - NUM_FRAME_TOKENS - (self.pairs != "none")

    @property
    def in_words(self) -> str:
        """What a checkpoint records."""
        kind = "whole sentences" if self.pairs == "none" else f"pairs for {self.pairs}"
        return f"{kind}, a share of {self.short_share} shorter, each text {self.texts_read} times"


class _PaddedSet:
    """The samples of one set by number."""

    def __init__(self, opened: OpenedSet, how: Padding, *, seed: int) -> None:
        self.opened = opened
        self.sentences = Sentences(opened.dataset)
        self.cutting = Cutting(
            room=how.room, short_share=how.short_share, min_sentences=1 if how.pairs == "none" else 2, seed=seed
        )
        self.cuts: Cuts = cut_documents(self.sentences, opened.documents, self.cutting)
        self._how = how

    @property
    def num_texts(self) -> int:
        return len(self.cuts)

    @property
    def has_other_document(self) -> bool:
        """Return whether there are samples of two documents."""
        begin = self.cuts.begin
        return len(begin) > 0 and self.sentences.document(int(begin[0])) != self.sentences.document(int(begin[-1]))

    def text(self, cut: int) -> NDArray[np.int64]:
        """Return the whole of one sample."""
        begin = int(self.cuts.begin[cut])
        return self._read(begin, begin + int(self.cuts.length[cut]))

    def pair(self, cut: int, generator: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """Return two texts, and 0 if the second follows the first, else 1."""
        begin, length = int(self.cuts.begin[cut]), int(self.cuts.length[cut])
        borders = self.sentences.within(begin, begin + length)
        middle = int(generator.choice(borders)) if len(borders) else begin + length // 2
        label = int(generator.random() < 0.5)
        spans = (begin, middle), (middle, begin + length)
        if label and self._how.pairs == "sentence_order":
            spans = spans[1], spans[0]
        elif label:
            target = int(self.cutting.targets(self.cuts.begin[cut : cut + 1])[0])
            spans = spans[0], self._elsewhere(begin, target - (middle - begin), generator)
        first, second = self._read(*spans[0]), self._read(*spans[1])
        return *truncate_pair(first, second, self._how.room, generator), label

    def _elsewhere(self, token: int, room: int, generator: np.random.Generator) -> tuple[int, int]:
        """Return sentences of another document than a token's: at least one, as many as fit into `room` tokens."""
        begins = self.cuts.begin
        low, high = np.searchsorted(begins, self.sentences.document(token)).tolist()
        other = int(generator.integers(len(begins) - (high - low)))
        other += (high - low) * (other >= low)
        begin, length = int(begins[other]), int(self.cuts.length[other])
        start = int(generator.choice([begin, *self.sentences.within(begin, begin + length)]))
        end_of_document = self.sentences.document(start)[1]
        borders = [*self.sentences.within(start, end_of_document).tolist(), end_of_document]
        return start, max((border for border in borders if border <= start + room), default=borders[0])

    def _read(self, begin: int, end: int) -> NDArray[np.int64]:
        ids = self.opened.dataset.tokens(begin, end).astype(np.int64)
        how = self._how
        if how.vocab_size is not None and len(ids) and not 0 <= ids.min() <= ids.max() < how.vocab_size:
            raise DataFormatError(
                f"{self.opened.dataset.prefix}.bin: a token id between {begin} and {end} is outside a vocabulary "
                f"of {how.vocab_size}",
                hint="the corpus was written with another tokenizer, or is damaged: `megatron-7b data verify`",
            )
        return ids[:-1] if len(ids) and ids[-1] == how.eod_id else ids


class PaddedTexts(NumberedSamples):
    """Padded samples by global number, from 0 without end."""

    def __init__(
        self,
        source: Source,
        how: Padding,
        frame: Frame | None,
        *,
        seed: int,
        shuffle: bool = True,
        contents: Mapping[str, str] = UNKNOWN_CONTENTS,
        reached: Reached | None = None,
    ) -> None:
        """Cut the documents of a split into samples.

        Args:
            source: The split.
            how: Lengths and pairs.
            frame: What stands around texts; None to count samples without reading them.
            seed: The run's.
            shuffle: False reads every set in the order of the file, in every epoch.
            contents: As for `open_split`.
            reached: As for `open_split`.

        Raises:
            ConfigError: The corpora are not divided into sentences, or the samples would not continue those of
                `reached`.
            DataFormatError: A set, or all of them, is smaller than one sample.
        """
        opened = [_PaddedSet(one, how, seed=seed) for one in source.sets]
        kept = [one for one in opened if one.num_texts and (how.pairs != "next_sentence" or one.has_other_document)]
        for one in opened if not source.may_leave_out or not kept else ():
            if one not in kept:
                raise _why_none(one, how, source.split)
        self._sets = kept
        rates = [Fraction(one.num_texts * how.texts_read) for one in kept]
        of_sets = [one.opened for one in kept]
        continuation = source.order(
            of_sets, rates, seq_length=how.seq_length, seed=seed, cut=how.in_words, contents=contents, reached=reached
        )
        order = continuation.order
        super().__init__(
            parts_of(of_sets, order, list(map(int, rates)), rates), continuation, left_out=source.left_out(of_sets)
        )
        self._how, self._frame, self._seed = how, frame, seed
        self._keys = [
            stream_key(seed, source.split, one.number, pass_begin=order.pass_begin) if shuffle else None
            for one in order.sets
        ]

    def read(self, indices: Sequence[int] | NDArray[np.int64]) -> FramedTexts:
        """Return the samples of these numbers."""
        assert self._frame is not None
        frame, shape = self._frame, (len(indices), self.seq_length)
        assert frame.pad_id is not None
        ids, is_text = np.full(shape, frame.pad_id, dtype=np.int64), np.zeros(shape, dtype=bool)
        types, lengths = np.zeros(shape, dtype=np.int64), np.empty(shape[0], dtype=np.int64)
        labels = np.zeros(shape[0], dtype=np.int64)
        sets, samples = self.locate_in_sets(indices)
        for row, (which, sample) in enumerate(zip(sets.tolist(), samples.tolist(), strict=True)):
            texts, labels[row] = self._texts(which, sample // self._how.texts_read)
            ids[row, 0], place = frame.cls_id, 1
            for number, text in enumerate(texts):
                end = place + len(text)
                ids[row, place:end], ids[row, end] = text, frame.sep_id
                is_text[row, place:end], types[row, place : end + 1] = True, number
                place = end + 1
            lengths[row] = place
        is_pair = self._how.pairs != "none"
        return FramedTexts(
            ids=ids,
            is_text=is_text,
            lengths=lengths,
            sets=sets,
            numbers=samples // self._how.texts_read,
            versions=samples % self._how.texts_read,
            tokentype_ids=types if is_pair else None,
            pair_labels=labels if is_pair else None,
        )

    def _texts(self, which: int, number: int) -> tuple[tuple[NDArray[np.int64], ...], int]:
        """Return the texts of one sample of a set, and the class of a pair."""
        one, key = self._sets[which], self._keys[which]
        epoch, cut = divmod(number, one.num_texts)
        if key is not None:
            cut = Permutation(one.num_texts, (key + epoch) % 2**64)(cut)
        if self._how.pairs == "none":
            return (one.text(cut),), 0
        purpose = f"sentence pairs/{self.order.sets[which].number}"
        first, second, label = one.pair(cut, sample_generator(self._seed, purpose, number))
        return (first, second), label


def truncate_pair(
    first: NDArray[np.int64], second: NDArray[np.int64], room: int, generator: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Shorten the longer of two texts, or both to the same length, until they fit.

    Args:
        first: Token ids, [n].
        second: Token ids, [m].
        room: Tokens of both together.
        generator: Decides how many tokens go at the beginning and how many at the end.
    """
    half = room // 2
    allowed = max(half, room - len(second)), max(room - half, room - len(first))
    shortened = []
    for text, most in zip((first, second), allowed, strict=True):
        excess = max(0, len(text) - most)
        front = int(generator.binomial(excess, 0.5)) if excess else 0
        shortened.append(text[front : front + len(text) - excess])
    return shortened[0], shortened[1]


def _why_none(one: _PaddedSet, how: Padding, split: Split) -> ConfigError | DataFormatError:
    """Return why a set gives no sample."""
    prefix = one.opened.dataset.prefix
    share = "give it a larger share in data.split" + (", or name a corpus as data.valid" if split == "valid" else "")
    if how.pairs == "none":
        return DataFormatError(f"{prefix} has no document of two tokens for {split}", hint=share)
    bounds = one.opened.dataset.document_indices
    if len(bounds) < 2 or int(np.diff(bounds).max()) < 2:
        return ConfigError(
            f"objective.sentence_pairs is {how.pairs}, but the documents of {prefix} are not divided into sentences",
            hint="`megatron-7b preprocess --split-sentences …` writes PREFIX_text_sentence, where they are",
        )
    needed = "two documents" if how.pairs == "next_sentence" else "a document"
    return DataFormatError(
        f"{prefix} has too little text for {split}: objective.sentence_pairs = {how.pairs} takes {needed} of at least "
        "two sentences",
        hint=share,
    )
