"""Words as the quality rules count them.

Whitespace parts words, and punctuation stays on the word it touches: counted as words of its own it would make rules
that were tuned on whitespace drop half of all clean documents. In scripts that are written without spaces (Chinese,
Japanese, Thai, Lao, Burmese, Khmer) each character is a word, with the punctuation after it.
"""

import math
import re
from collections.abc import Sequence

_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\uff66-\uff9f\U00020000-\U0003ffff"
)
_UNSPACED_CHARACTER = re.compile(f"[{_UNSPACED}]")
_WORD = re.compile(rf"[{_UNSPACED}][^\w\s]*|[^\s{_UNSPACED}]+")
_LETTERS = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


def split_words(text: str) -> list[str]:
    """Return the words of a text, in order; linear in its length."""
    if text.isascii() or not _UNSPACED_CHARACTER.search(text):
        return text.split()
    return _WORD.findall(text)


def split_bare_words(text: str) -> list[str]:
    """Split as `split_words`, without punctuation: runs of letters, digits and underscores."""
    return _LETTERS.findall(text)


def is_unspaced(text: str, num_words: int) -> bool:
    """Return whether most of a text's words are single characters of a script without spaces."""
    return not text.isascii() and 2 * len(_UNSPACED_CHARACTER.findall(text)) > num_words


def mean_spaced_length(words: Sequence[str]) -> float:
    """Return the mean length of words with a letter or digit in scripts with spaces; infinite if there are none."""
    spaced = [word for word in words if not _UNSPACED_CHARACTER.match(word) and _LETTERS.search(word)]
    return sum(map(len, spaced)) / len(spaced) if spaced else math.inf
