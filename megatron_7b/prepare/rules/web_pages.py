"""Rules for web pages: C4's (Raffel et al. 2020, section 2.2), FineWeb's (Penedo et al. 2024, section 3.6), bad words.

Source: the decisions of the first two are those of datatrove's filters, which the tests compare with.
"""

import re
from pathlib import Path

from megatron_7b.errors import DataFormatError
from megatron_7b.prepare.document import Document, Removed
from megatron_7b.prepare.document_sections import C4Section, FineWebSection
from megatron_7b.prepare.rules.gopher import count_repeated
from megatron_7b.prepare.rules.words import is_unspaced, split_bare_words, split_words

_CITATION = re.compile(r"\[(?:\d*|edit|citation needed)\]")
_C4_LINE_ENDS = (".", "?", "!", '"', "'", "。", "？", "！", "”", "」")
_SENTENCE_END = re.compile(r"[.?!。？！]+[\"'”」)]*(?=\s|$|[\u3040-\u9fff])")
_POLICY_PHRASES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_LINE_ENDS = tuple(".?!。？！｡．؟۔।॥։።፧᙮‼‽⁇⁈⁉…")
_SHORT_LINE_FACTOR = 3


class C4:
    """Keeps the lines of a page that are sentences, and pages with enough of them."""

    name = "c4"

    def __init__(self, section: C4Section) -> None:
        self._section = section

    def __call__(self, document: Document) -> Document | Removed:
        """Return the document with the lines that stay."""
        section, lowered = self._section, document.text.lower()
        if section.drop_lorem_ipsum and "lorem ipsum" in lowered:
            return Removed("c4:lorem_ipsum", "the page has a placeholder's text")
        if section.drop_curly_brackets and "{" in document.text:
            return Removed("c4:curly_bracket", "the page has a curly bracket")
        lines = [line for line in map(self._clean, document.text.splitlines()) if line is not None]
        sentences = sum(max(1, len(_SENTENCE_END.findall(line))) for line in lines)
        if sentences < section.min_sentences:
            return Removed("c4:too_few_sentences", f"{sentences} left, at least {section.min_sentences} wanted")
        document.text = "\n".join(lines)
        return document

    def _clean(self, line: str) -> str | None:
        """Return a line as it stays, or None."""
        section, line = self._section, line.strip()
        words = split_words(line)
        if len(words) < section.min_words_per_line or any(len(word) > section.max_word_length for word in words):
            return None
        if section.remove_citations:
            line = _CITATION.sub("", line)
        if section.terminal_punctuation and (not line.endswith(_C4_LINE_ENDS) or line.endswith("...")):
            return None
        lowered = line.lower()
        if section.drop_javascript_lines and "javascript" in lowered:
            return None
        if section.drop_policy_lines and any(phrase in lowered for phrase in _POLICY_PHRASES):
            return None
        return line


class FineWeb:
    """Drops pages that are lists, menus and tables rather than text."""

    name = "fineweb"

    def __init__(self, section: FineWebSection) -> None:
        self._section = section

    def __call__(self, document: Document) -> Document | Removed:
        """Keep a document that passes every rule."""
        section, text = self._section, document.text
        lines = [line for line in text.split("\n") if line.strip()]
        words = split_words(text)
        if not lines or not words:
            return Removed("fineweb:empty", "no word")
        punctuated = sum(line.endswith(_LINE_ENDS) for line in lines) / len(lines)
        if punctuated < section.min_punctuated_lines:
            wanted = f"at least {section.min_punctuated_lines:g} wanted"
            return Removed("fineweb:unpunctuated_lines", f"{punctuated:.3g} end with punctuation, {wanted}")
        short = section.short_line_length // (_SHORT_LINE_FACTOR if is_unspaced(text, len(words)) else 1)
        for rule, value, limit in (
            ("short_lines", sum(len(line) <= short for line in lines) / len(lines), section.max_short_lines),
            (
                "duplicate_line_characters",
                count_repeated(lines)[1] / len(text.replace("\n", "")),
                section.max_duplicate_line_characters,
            ),
            ("lines_per_word", text.count("\n") / len(words), section.max_lines_per_word),
        ):
            if value > limit:
                return Removed(f"fineweb:{rule}", f"{value:.3g}, at most {limit:g} wanted")
        return document


class BadWords:
    """Drops documents with a word or phrase of a list; only whole words count, and no case."""

    name = "bad_words"

    def __init__(self, path: str) -> None:
        self._phrases: dict[str, list[list[str]]] = {}
        for phrase in read_phrases(path):
            self._phrases.setdefault(phrase[0], []).append(phrase)

    def __call__(self, document: Document) -> Document | Removed:
        """Keep a document without any of them."""
        words = split_bare_words(document.text.lower())
        for position, word in enumerate(words):
            for phrase in self._phrases.get(word, ()):
                if words[position : position + len(phrase)] == phrase:
                    return Removed("bad_words", " ".join(phrase))
        return document


def read_phrases(path: str) -> list[list[str]]:
    """Return the words of each line of a list of words and phrases.

    Raises:
        DataFormatError: The file cannot be read, or holds no word.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").lower().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataFormatError(f"quality.bad_words: {path} cannot be read: {error}") from error
    phrases = [words for line in lines if (words := split_bare_words(line))]
    if not phrases:
        raise DataFormatError(f"quality.bad_words: {path} holds no word", hint="one word or phrase per line")
    return phrases
