"""The quality rules of Gopher (Rae et al. 2021, appendix A.1.1), on whole documents.

Source: the decisions are those of datatrove's filters, which the tests compare with; n-grams are counted in NumPy,
because built as strings they take ten times as long as everything else in the pipeline together.
"""

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_7b.prepare.document import Document, Removed
from megatron_7b.prepare.document_sections import GopherQualitySection, GopherRepetitionSection
from megatron_7b.prepare.rules.words import is_unspaced, mean_spaced_length, split_words

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
_PARAGRAPHS = re.compile(r"\n{2,}")
_LINES = re.compile(r"\n+")
_HAS_LETTER = re.compile(r"[^\W\d_]").search
_HAS_LETTER_OR_DIGIT = re.compile(r"[^\W_]").search
_ELLIPSES = ("...", "…")
_UNSPACED_FACTOR = 2
"""A word of a script without spaces is two characters long on average: n-grams take twice as many of them."""


class GopherRepetition:
    """Drops documents that repeat themselves."""

    name = "gopher_repetition"

    def __init__(self, section: GopherRepetitionSection) -> None:
        self._section = section

    def __call__(self, document: Document) -> Document | Removed:
        """Keep a document whose parts are mostly different."""
        section, text = self._section, document.text
        length = max(1, len(text))
        for kind, parts, max_share, max_characters in (
            (
                "paragraph",
                _PARAGRAPHS.split(text.strip()),
                section.max_duplicate_paragraphs,
                section.max_duplicate_paragraph_characters,
            ),
            ("line", _LINES.split(text), section.max_duplicate_lines, section.max_duplicate_line_characters),
        ):
            repeated, characters = count_repeated(parts)
            if repeated > max_share * len(parts):
                return _over(self.name, f"duplicate_{kind}s", repeated / len(parts), max_share)
            if characters > max_characters * length:
                return _over(self.name, f"duplicate_{kind}_characters", characters / length, max_characters)
        words = split_words(text)
        factor = _UNSPACED_FACTOR if is_unspaced(text, len(words)) else 1
        return self._check_ngrams(words, length, factor) or document

    def _check_ngrams(self, words: list[str], length: int, factor: int) -> Removed | None:
        ngrams = RepeatedNgrams(words, joint=1 if factor == 1 else 0)
        tops = {factor * n: share for n, share in enumerate(self._section.max_top_ngrams, start=2)}
        repeats = {factor * n: share for n, share in enumerate(self._section.max_duplicate_ngrams, start=5)}
        # One pass by growing n, though all the top n-grams count before the first repeated ones.
        later: Removed | None = None
        for n in range(2, max(*tops, *repeats) + 1):
            ngrams.grow(n)
            if n in tops and ngrams.top_characters() > tops[n] * length:
                return _over(self.name, f"top_{n // factor}_gram", ngrams.top_characters() / length, tops[n])
            if later is None and n in repeats and (found := ngrams.repeated_characters()) > repeats[n] * length:
                later = _over(self.name, f"duplicate_{n // factor}_grams", found / length, repeats[n])
            if later is not None and n >= max(tops):
                return later
        return later


class RepeatedNgrams:
    """The n-grams that a document has more than once, for n = 2, 3, … in turn.

    Only where the (n-1)-gram is repeated can the n-gram be, so the set of positions shrinks quickly; among those left,
    equal ones are found by sorting pairs of numbers, exactly.
    """

    def __init__(self, words: Sequence[str], joint: int) -> None:
        """Begin with n = 1.

        Args:
            words: Of the document, in order.
            joint: Characters between two words, which count as part of an n-gram.
        """
        numbers: dict[str, int] = {}
        # A word's number is where it first occurs.
        self._words = np.fromiter(map(numbers.setdefault, words, range(len(words))), np.int64, len(words))
        lengths = np.fromiter(map(len, words), np.int64, len(words))
        self._ends = np.concatenate([[0], np.cumsum(lengths)])
        self._joint = joint
        self._n = 1
        # A word that occurs once is in no repeated n-gram.
        self._is_common: NDArray[np.bool_] = np.bincount(self._words, minlength=1)[self._words] > 1
        self._positions: NDArray[np.int64] = np.flatnonzero(self._is_common)
        self._grams = self._words[self._positions]

    def grow(self, n: int) -> None:
        """Go on to n-grams one word longer than before."""
        assert n == self._n + 1, "n grows by one, so that the shorter ones have narrowed the search"
        self._n = n
        positions, grams = self._positions, self._grams
        if len(positions) and positions[-1] + n > len(self._words):  # only the last one can stick out
            positions, grams = positions[:-1], grams[:-1]
        common = self._is_common[positions + (n - 1)]
        positions, grams = positions[common], grams[common]
        if not len(positions):
            self._positions, self._grams = positions, grams
            return
        pairs = grams * len(self._words) + self._words[positions + (n - 1)]
        order = np.argsort(pairs, kind="stable")
        pairs = pairs[order]
        differs = np.empty(len(pairs) + 1, np.bool_)
        differs[0] = differs[-1] = True
        np.not_equal(pairs[1:], pairs[:-1], out=differs[1:-1])
        repeated = ~(differs[1:] & differs[:-1])  # equal to the one before or after
        numbers = np.empty(len(pairs), np.int64)
        numbers[order] = np.cumsum(differs[:-1]) - 1
        kept = np.zeros(len(pairs), np.bool_)
        kept[order] = repeated
        self._positions, self._grams = positions[kept], numbers[kept]

    def top_characters(self) -> int:
        """Characters in all occurrences of the most frequent n-gram, the earliest of them where several are."""
        if len(self._words) < self._n:
            return 0
        if not len(self._positions):
            return self._characters(0) + self._joint * (self._n - 1)
        counts = np.bincount(self._grams)
        position = int(self._positions[np.argmax(counts[self._grams])])
        return int(counts.max()) * (self._characters(position) + self._joint * (self._n - 1))

    def repeated_characters(self) -> int:
        """Characters in n-grams that occurred before, going from left to right and skipping what has been counted."""
        seen: set[int] = set()
        characters, next_position = 0, 0
        for position, gram in zip(self._positions.tolist(), self._grams.tolist(), strict=True):
            if position < next_position:
                continue
            if gram in seen:
                characters += self._characters(position)
                next_position = position + self._n
            else:
                seen.add(gram)
        return characters

    def _characters(self, position: int) -> int:
        return int(self._ends[position + self._n] - self._ends[position])


class GopherQuality:
    """Drops documents whose words and lines do not look like prose."""

    name = "gopher_quality"

    def __init__(self, section: GopherQualitySection) -> None:
        self._section = section
        self._stop_words = frozenset(section.stop_words or STOP_WORDS)

    def __call__(self, document: Document) -> Document | Removed:
        """Keep a document that passes every rule."""
        text = document.text
        words = split_words(text)
        # Most words are letters alone: only the others are looked at one by one.
        others = [word for word in words if not word.isalpha()]
        alphabetic = 1 - sum(1 for word in others if not _HAS_LETTER(word)) / max(1, len(words))
        return (
            self._check_words(text, words, [word for word in others if not _HAS_LETTER_OR_DIGIT(word)])
            or self._check_lines(text)
            or self._check_prose(words, alphabetic, document.fields.get("language", "en"))
            or document
        )

    def _check_words(self, text: str, words: list[str], symbols: list[str]) -> Removed | None:
        section = self._section
        real = len(words) - len(symbols)
        if real < section.min_words:
            return self._removed("too_few_words", f"{real} words, at least {section.min_words} wanted")
        if real > section.max_words:
            return self._removed("too_many_words", f"{real} words, at most {section.max_words} wanted")
        mean_length = (sum(map(len, words)) - sum(map(len, symbols))) / max(1, real)
        wanted = section.min_mean_word_length
        # Where single characters are words, the few others say nothing of a text: they are its figures and initials.
        if mean_length < wanted and not is_unspaced(text, len(words)) and mean_spaced_length(words) < wanted:
            return self._removed("short_words", f"mean length {mean_length:.2f}, at least {wanted:g} wanted")
        if mean_length > section.max_mean_word_length:
            return _over(self.name, "long_words", mean_length, section.max_mean_word_length)
        for rule, count in (("hashes", text.count("#")), ("ellipses", sum(text.count(mark) for mark in _ELLIPSES))):
            if count > section.max_symbols_per_word * len(words):
                return _over(self.name, rule, count / max(1, len(words)), section.max_symbols_per_word)
        return None

    def _check_prose(self, words: list[str], alphabetic: float, language: str) -> Removed | None:
        section = self._section
        if alphabetic < section.min_alphabetic_words:
            wanted = section.min_alphabetic_words
            return self._removed("few_alphabetic_words", f"{alphabetic:.2f}, at least {wanted:g} wanted")
        # English stop words say nothing of other languages.
        if section.stop_words or language == "en":
            found = len(self._stop_words.intersection(words))
            if found < section.min_stop_words:
                return self._removed("few_stop_words", f"{found}, at least {section.min_stop_words} wanted")
        return None

    def _check_lines(self, text: str) -> Removed | None:
        section, lines = self._section, text.splitlines()
        bullets = sum(line.lstrip().startswith(("•", "-")) for line in lines)
        if bullets > section.max_bullet_lines * len(lines):
            return _over(self.name, "bullet_lines", bullets / len(lines), section.max_bullet_lines)
        ellipses = sum(line.rstrip().endswith(_ELLIPSES) for line in lines)
        if ellipses > section.max_ellipsis_lines * len(lines):
            return _over(self.name, "ellipsis_lines", ellipses / len(lines), section.max_ellipsis_lines)
        return None

    def _removed(self, rule: str, detail: str) -> Removed:
        return Removed(f"{self.name}:{rule}", detail)


def count_repeated(parts: Sequence[str]) -> tuple[int, int]:
    """Return how many of the parts equal an earlier one, and their characters."""
    seen: set[str] = set()
    repeated = characters = 0
    for part in parts:
        if part in seen:
            repeated += 1
            characters += len(part)
        else:
            seen.add(part)
    return repeated, characters


def _over(stage: str, rule: str, value: float, limit: float) -> Removed:
    return Removed(f"{stage}:{rule}", f"{value:.3g}, at most {limit:g} wanted")
