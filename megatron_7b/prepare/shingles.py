"""Hashes of words, and of runs of words, of many texts: in NumPy, with no Python object per word.

A word is a run of letters and digits in lower case; a character of Korean, or of a script that is written without
spaces (Chinese, Japanese, Thai, Lao, Burmese, Khmer), is a word of its own. So neither spacing nor punctuation nor case
makes two texts different.

Every hash is a polynomial over a segment, taken from prefix sums modulo 2**64: sum(v[i] * p**i), made independent of
where the segment begins by a multiplication with p**-start. Bytes give words, words give shingles.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

_BYTE_BASE = 0x9E3779B97F4A7C15
_WORD_BASE = 0xD6E8FEB86659FD93
"""Odd, so that they have inverses modulo 2**64; otherwise arbitrary, but part of all signatures."""

_SEPARATOR, _WORD, _ALONE = 0, 1, 2
_BY_TWO_BYTES = (
    (0xC2, range(0x80, 0xC0), _SEPARATOR),  # Latin-1 signs
    (0xE2, range(0x80, 0x82), _SEPARATOR),  # general punctuation
    (0xE3, range(0x80, 0x81), _SEPARATOR),  # punctuation of Chinese
    (0xE0, range(0xB8, 0xBC), _ALONE),  # Thai, Lao
    (0xE1, range(0x80, 0x82), _ALONE),  # Burmese
    (0xE1, range(0x9E, 0xA0), _ALONE),  # Khmer
)


@dataclass(frozen=True, slots=True)
class Words:
    """The words of some texts, one text after the other."""

    hashes: NDArray[np.uint64]
    """[words]"""
    starts: NDArray[np.int64]
    """[words] where each begins among the bytes of the texts, each in lower case as UTF-8, with one byte after each."""
    ends: NDArray[np.int64]
    """[words] where each ends there."""
    firsts: NDArray[np.int64]
    """[texts + 1] number of the first word of each text."""


def hash_words(texts: Sequence[str]) -> Words:
    """Find and hash all words."""
    data, borders = _join(texts)
    starts, ends = _find_words(data)
    hashes = _hash_segments(data.astype(np.uint64) + np.uint64(1), starts, ends, _BYTE_BASE)
    return Words(hashes, starts, ends, np.searchsorted(starts, borders))


def hash_runs(words: Words, size: int) -> NDArray[np.uint64]:
    """[words - size + 1] hashes of all runs of `size` words, also of those across the border of two texts."""
    begins = np.arange(max(0, len(words.hashes) - size + 1))
    return _hash_segments(words.hashes, begins, begins + size, _WORD_BASE)


def hash_shingles(texts: Sequence[str], size: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Hashes of the runs of `size` words of each text.

    Args:
        texts: Any; a text of fewer words than `size` has one shingle, of all its words, and one without words none.
        size: Words in a shingle.

    Returns:
        Hashes of all texts one after the other, and [texts + 1] where those of each begin.
    """
    words = hash_words(texts)
    num_words = np.diff(words.firsts)
    num_shingles = np.where(num_words > 0, np.maximum(num_words - size + 1, 1), 0)
    offsets = np.concatenate([[0], np.cumsum(num_shingles)])
    begins = np.arange(offsets[-1]) + np.repeat(words.firsts[:-1] - offsets[:-1], num_shingles)
    ends = begins + np.repeat(np.minimum(num_words, size), num_shingles)
    return _hash_segments(words.hashes, begins, ends, _WORD_BASE), offsets.astype(np.uint64)


def _join(texts: Sequence[str]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return all texts in lower case as bytes, a separator after each, and where each begins."""
    encoded = [text.lower().encode(errors="surrogatepass") for text in texts]
    borders = np.cumsum([0, *(len(text) + 1 for text in encoded)], dtype=np.int64)
    return np.frombuffer(b"\n".join([*encoded, b""]), dtype=np.uint8), borders


def _find_words(data: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where each word begins and ends; the last byte is a separator."""
    kinds = _byte_kinds()[data]
    alone = np.empty(0, dtype=np.int64)
    if data.max(initial=0) >= 0x80:
        _correct_kinds(data, kinds)
        alone = np.flatnonzero(kinds == _ALONE)
    is_word = kinds != _SEPARATOR
    is_start, is_end = is_word.copy(), ~is_word
    is_start[1:] &= ~is_word[:-1]
    is_end[1:] &= is_word[:-1]
    is_end[:1] = False
    if alone.size:
        after = alone + np.where(data[alone] >= 0xF0, 4, 3)
        for border in (alone, after[is_word[after]]):
            is_start[border] = True
        is_end |= is_start & np.concatenate([[False], is_word[:-1]])
    return np.flatnonzero(is_start), np.flatnonzero(is_end)


def _correct_kinds(data: NDArray[np.uint8], kinds: NDArray[np.uint8]) -> None:
    """Set the kind of characters whose first byte does not tell it."""
    for lead, seconds, kind in _BY_TWO_BYTES:
        at = np.flatnonzero(data == lead)
        if len(seconds) < 64:
            at = at[np.isin(data[at + 1], seconds)]
        kinds[at] = kind
        if kind == _SEPARATOR:
            for place in range(1, 2 if lead < 0xE0 else 3):
                kinds[at + place] = kind


@cache
def _byte_kinds() -> NDArray[np.uint8]:
    kinds = np.zeros(256, dtype=np.uint8)
    kinds[[*range(ord("0"), ord("9") + 1), *range(ord("a"), ord("z") + 1)]] = _WORD
    kinds[0x80:] = _WORD
    kinds[0xE3:0xEE] = _ALONE  # leads of U+3000 to U+DFFF: kana, Chinese characters, Hangul
    kinds[0xF0] = _ALONE  # leads of the planes 1 to 3: rare Chinese characters, emoji
    return kinds


def _hash_segments(
    values: NDArray[np.uint64], starts: NDArray[np.int64], ends: NDArray[np.int64], base: int
) -> NDArray[np.uint64]:
    """[len(starts)] mixed polynomial hashes of values[start:end]."""
    powers, inverses = _powers(base, 1 << max(16, len(values).bit_length()))
    sums = np.zeros(len(values) + 1, dtype=np.uint64)
    np.cumsum(values * powers[: len(values)], out=sums[1:])
    return _mix((sums[ends] - sums[starts]) * inverses[starts])


@cache
def _powers(base: int, count: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """base**i and base**-i modulo 2**64 for i < count."""
    both = []
    for factor in (base, pow(base, -1, 1 << 64)):
        factors = np.full(count, factor, dtype=np.uint64)
        factors[:1] = 1
        both.append(np.multiply.accumulate(factors))
    return both[0], both[1]


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the finisher of splitmix64: a permutation after which every input bit has reached every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = values ^ (values >> np.uint64(31))
    return mixed
