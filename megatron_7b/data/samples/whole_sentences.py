"""Documents cut into samples of whole sentences, for samples that are filled up with padding.

A sample is as many sentences of one document, one after the other, as fit; where a single sentence is longer than a
sample, it is cut. What a corpus calls a sequence is a sentence here: with `--split-sentences` it is one, else a whole
document. A share of the samples stops at a random length instead, as BERT's do, so that short inputs are seen in
training too. Where samples must hold two sentences, they take at least two, and no document leaves a single one over.

Cuts are the same in every epoch, and are found anew at every start: all documents advance together, sample by sample,
so a start costs some seconds per hundred million sentences, and twelve bytes of memory per sample.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_7b.data.corpus.indexed_dataset import IndexedDataset

_SHORTEST = 2
"""Tokens. What is shorter is left out: there is nothing to tell a hidden token from."""


@dataclass(frozen=True, kw_only=True)
class Cutting:
    """How documents are cut."""

    room: int
    """Most tokens of a sample, without its frame."""
    short_share: float
    """Share of the samples that end at a random length."""
    min_sentences: int = 1
    """1 or 2. With 2, samples may exceed `room`, and documents of one sentence are left out."""
    seed: int
    """The run's."""

    def targets(self, begins: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how many tokens the samples that begin at these places of the corpus shall have at most."""
        drawn = _hash(begins, self.seed)
        is_short = (drawn >> np.uint64(11)).astype(np.float64) * 2.0**-53 < self.short_share
        spread = max(1, self.room - _SHORTEST + 1)
        short = (_hash(begins, self.seed + 1) % np.uint64(spread)).astype(np.int64) + _SHORTEST
        return np.where(is_short, np.minimum(short, self.room), self.room)


@dataclass(frozen=True, kw_only=True)
class Cuts:
    """The samples of some documents, in the order of the file."""

    begin: NDArray[np.int64]
    """First token of each in the .bin, [n]."""
    length: NDArray[np.int32]
    """Tokens of each, [n]."""

    def __len__(self) -> int:
        return len(self.begin)


class Sentences:
    """Where the sentences and documents of a corpus begin, in tokens of its .bin."""

    def __init__(self, dataset: IndexedDataset) -> None:
        """Look at a corpus.

        Args:
            dataset: Its sequences are sentences.

        Raises:
            DataFormatError: They do not follow one another in the .bin.
        """
        dataset.corpus.tokens_before(0)  # refuses what is not contiguous
        self.dataset = dataset
        self._pointers = dataset.corpus.sequence_pointers
        self._width = dataset.dtype.itemsize

    def begin(self, sentences: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the first token of each, [n]; one past the last sentence begins at the end."""
        inside = np.minimum(sentences, len(self._pointers) - 1)
        return np.where(sentences < len(self._pointers), self._pointers[inside] // self._width, self.dataset.num_tokens)

    def holding(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the last sentence that begins at or before each token, [n]; at the end of all, one past the last."""
        found = np.searchsorted(self._pointers, tokens * self._width, side="right") - 1
        return np.where(tokens < self.dataset.num_tokens, found, len(self._pointers))

    def within(self, begin: int, end: int) -> NDArray[np.int64]:
        """Return where sentences begin between two tokens, both left out."""
        first, last = np.searchsorted(self._pointers, [begin * self._width + 1, end * self._width])
        return np.unique(self._pointers[first:last]) // self._width

    def document(self, token: int) -> tuple[int, int]:
        """Return the first token of a token's document, and the first after it."""
        bounds = self.dataset.document_indices
        number = int(np.searchsorted(bounds, self.holding(np.array([token]))[0], side="right")) - 1
        begin, end = self.begin(bounds[number : number + 2]).tolist()
        return begin, end


def cut_documents(sentences: Sentences, documents: tuple[int, int], how: Cutting) -> Cuts:
    """Cut a range of documents into samples.

    Args:
        sentences: Of the corpus.
        documents: First document, and one past the last.
        how: Room, and what each sample must hold.
    """
    bounds = sentences.dataset.document_indices[documents[0] : documents[1] + 1]
    firsts, lasts = bounds[:-1], bounds[1:]
    large = lasts - firsts >= how.min_sentences
    sentence, last = firsts[large], lasts[large]  # of each document: the next one that is not cut yet, one past all
    place, end_of_document = sentences.begin(sentence), sentences.begin(last)
    begins, lengths = [], []
    while len(place):
        end, following = _ends(sentences, how, place, sentence, last)
        kept = end - place >= _SHORTEST
        begins.append(place[kept])
        lengths.append((end - place)[kept].astype(np.int32))
        more = end < end_of_document
        place, sentence, last, end_of_document = end[more], following[more], last[more], end_of_document[more]
    begin = np.concatenate([np.empty(0, np.int64), *begins])
    order = np.argsort(begin)
    return Cuts(begin=begin[order], length=np.concatenate([np.empty(0, np.int32), *lengths])[order])


def _ends(
    sentences: Sentences,
    how: Cutting,
    place: NDArray[np.int64],
    sentence: NDArray[np.int64],
    last: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where the samples that begin at `place` end, and the sentence there, all [documents]."""
    following = np.minimum(sentences.holding(place + how.targets(place)), last)
    if how.min_sentences > 1:
        following = np.minimum(np.maximum(following, sentence + how.min_sentences), last)
        following = np.where(last - following < how.min_sentences, last, following)
        return sentences.begin(following), following
    end = sentences.begin(following)
    is_whole = end > place
    # The sentence at hand is longer than what was wanted: all of it that there is room for.
    end_of_sentence = sentences.begin(np.minimum(sentences.holding(place) + 1, last))
    end = np.where(is_whole, end, np.minimum(end_of_sentence, place + how.room))
    return end, np.minimum(sentences.holding(end), last)


def _hash(values: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """Return 64 random bits per value.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014 (SplitMix64).
    """
    mixed = values.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed * 0xD1342543DE82EF95 % 2**64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
