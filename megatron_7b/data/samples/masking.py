"""Which tokens of a text are hidden, and what stands in their place (BERT).

- Units are whole words, where the caller says which tokens begin one (`find_word_beginnings`, `ChineseWords`); else
  single tokens.
- Spans of 1 to `max_ngram` neighbouring units are drawn, n with a probability proportional to 1/n, from random places,
  until `masked_share` of the text's tokens is hidden, rounded, at least one; never more. A span that would exceed the
  budget, or reach a unit that is taken, is shortened. Special tokens are never hidden.
- A text may be shown several times (`masks_per_text`), with other units hidden each time: none is hidden twice. Later
  samples hide fewer where whole words leave too little.
- Each hidden token becomes the mask token in 80 %, any other token of the vocabulary in 10 %, and stays in 10 %.
- The word before a span is the unit that ends where the span begins; it is visible, and stays as it is.

Source: Devlin et al., "BERT", 2018; spans as in Megatron-LM's masked-language-model datasets.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_7b.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Masking:
    """How tokens are hidden."""

    mask_id: int
    """The mask token."""
    vocab_size: int
    """Random tokens are drawn below this."""
    special_ids: frozenset[int] = frozenset()
    """Tokens that are neither hidden nor drawn, besides the mask token."""
    begins_word: NDArray[np.bool_] | None = None
    """Whether a token begins a word, [vocab_size]; None: each token is a word."""
    segmenter: Callable[[NDArray[np.int64], NDArray[np.bool_]], NDArray[np.bool_]] | None = None
    """Whether each token of a text, [s], begins a word, from the text and what `begins_word` says of it."""
    masked_share: float = 0.15
    """Of the tokens that may be hidden."""
    max_ngram: int = 3
    """Longest span in words."""
    masks_per_text: int = 1
    """Samples that show the same text."""
    with_word_before: bool = False
    """The word before each span is predicted as well."""

    def check(self) -> None:
        """Refuse what is impossible.

        Raises:
            ConfigError: Ids lie outside of the vocabulary, all of it is special, or a number is out of its range.
        """
        ids = [self.mask_id, *self.special_ids]
        if not all(0 <= one < self.vocab_size for one in ids):
            raise ConfigError(f"special ids {sorted(ids)} do not all lie in a vocabulary of {self.vocab_size}")
        if len(set(ids)) >= self.vocab_size:
            raise ConfigError(f"a vocabulary of {self.vocab_size} with nothing but special tokens cannot be masked")
        if not 0 < self.masked_share < 1 or self.max_ngram < 1 or self.masks_per_text < 1:
            raise ConfigError(
                f"masked_share is {self.masked_share}, max_ngram {self.max_ngram}, masks_per_text "
                f"{self.masks_per_text}",
                hint="masked_share is between 0 and 1, spans have at least one word, texts at least one mask",
            )
        if self.begins_word is not None and len(self.begins_word) != self.vocab_size:
            raise ConfigError(f"begins_word has {len(self.begins_word)} entries for a vocabulary of {self.vocab_size}")


class Words(NamedTuple):
    """The words of a text, in its order."""

    first: NDArray[np.int64]
    """Place of the first token of each, [words]."""
    size: NDArray[np.int64]
    """Tokens of each, which follow one another, [words]."""


class Hidden(NamedTuple):
    """What is predicted of one sample."""

    places: NDArray[np.int64]
    """Hidden tokens, ascending."""
    before: NDArray[np.int64]
    """Tokens of the visible words before them, ascending."""


class Masker:
    """Draws what is hidden."""

    def __init__(self, masking: Masking) -> None:
        """Prepare.

        Args:
            masking: What to hide.

        Raises:
            ConfigError: It is impossible.
        """
        masking.check()
        self.masking = masking
        self._never = np.zeros(masking.vocab_size, dtype=bool)
        self._never[[masking.mask_id, *masking.special_ids]] = True
        self._drawable = np.flatnonzero(~self._never)
        weights = 1 / np.arange(1, masking.max_ngram + 1)
        self._ngrams = weights / weights.sum()

    def words(self, ids: NDArray[np.int64], is_text: NDArray[np.bool_]) -> Words:
        """Return the words of a sample.

        Args:
            ids: [s].
            is_text: Where it is text, [s]; a word never reaches across anything else.
        """
        masking = self.masking
        begins = np.ones(len(ids), dtype=bool) if masking.begins_word is None else masking.begins_word[ids]
        is_text = is_text & ~self._never[ids]
        if masking.segmenter is not None:
            begins = masking.segmenter(np.where(is_text, ids, -1), begins)
        return find_words(begins, is_text)

    def draw(self, words: Words, version: int, generator: np.random.Generator) -> Hidden:
        """Draw what one of the samples of a text hides.

        Args:
            words: Of the text.
            version: Which of the samples it is.
            generator: The same for all samples of the text.
        """
        count, sizes = len(words.first), words.size.tolist()
        budget = max(1, round(self.masking.masked_share * int(words.size.sum()))) if count else 0
        taken, own = np.zeros(count, dtype=bool), np.zeros(count, dtype=bool)
        for _ in range(version + 1):
            own = self._draw_words(sizes, budget, taken, generator)
            taken |= own
        before = np.zeros(count, dtype=bool)
        if self.masking.with_word_before and count:
            touches = words.first[:-1] + words.size[:-1] == words.first[1:]
            before[:-1] = own[1:] & ~own[:-1] & touches
        return Hidden(_places(words, own), _places(words, before))

    def _draw_words(
        self, sizes: list[int], budget: int, taken: NDArray[np.bool_], generator: np.random.Generator
    ) -> NDArray[np.bool_]:
        """Draw spans of words that are not taken yet, [words]."""
        lengths = generator.choice(len(self._ngrams), size=len(sizes), p=self._ngrams) + 1
        hidden, room = np.zeros(len(sizes), dtype=bool), budget
        for first, length in zip(generator.permutation(len(sizes)).tolist(), lengths.tolist(), strict=True):
            for word in range(first, min(first + length, len(sizes))):
                if taken[word] or hidden[word] or sizes[word] > room:
                    break
                hidden[word] = True
                room -= sizes[word]
            if room == 0:
                break
        return hidden

    def replace(self, ids: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.int64]:
        """Return what stands in the place of hidden tokens, [hidden]."""
        fate = generator.random(len(ids))
        others = generator.choice(self._drawable, size=len(ids))
        return np.where(fate < 0.8, self.masking.mask_id, np.where(fate < 0.9, others, ids))


def find_words(begins: NDArray[np.bool_], is_text: NDArray[np.bool_]) -> Words:
    """Return the words of a sample.

    Args:
        begins: Whether a token begins a word, [s].
        is_text: Other places belong to no word, and end one, [s].
    """
    follows = np.concatenate([[False], is_text[:-1]])
    first = np.flatnonzero(is_text & (begins | ~follows))
    word = np.cumsum(np.bincount(first, minlength=len(begins))) - 1
    return Words(first, np.bincount(word[is_text], minlength=len(first)))


def find_word_beginnings(pieces: Iterable[str]) -> NDArray[np.bool_]:
    """Return which tokens begin a word, from their spelling in the vocabulary, in the order of their ids, [vocab_size].

    Knows WordPiece (`##` continues), SentencePiece (`▁` begins) and byte-level BPE (`Ġ`, `Ċ`, `ĉ` begin).
    """
    spelled = list(pieces)
    if is_word_piece(spelled):
        return np.array([not piece.startswith("##") for piece in spelled])
    return np.array([piece.startswith(("▁", "Ġ", "Ċ", "ĉ")) for piece in spelled])


def is_word_piece(pieces: Iterable[str]) -> bool:
    """Return whether a vocabulary marks tokens that continue a word, as BERT's do."""
    return any(piece.startswith("##") and len(piece) > 2 for piece in pieces)


def _places(words: Words, chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the tokens of some words, ascending."""
    spans = [
        np.arange(first, first + size) for first, size in zip(words.first[chosen], words.size[chosen], strict=True)
    ]
    return np.concatenate([np.empty(0, dtype=np.int64), *spans])
