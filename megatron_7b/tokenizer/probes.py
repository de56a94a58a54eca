"""Texts on which tokenizers are known to part ways: two libraries, two classes, two versions of one definition."""

from collections.abc import Sequence

_MOST_TOKENS = 300
"""Special tokens that are tried one by one: a vocabulary may reserve thousands of them."""

_BLANKS = ("", " ", "  ", "\t", "\n", "\r\n", " \n ", "\n\n\n  x", "x  \n", " \t x\r", "a" + " " * 300 + "b")
_WORDS = (
    "I'll we've it's IT'S don't 'tis",
    "1 2 3 4 5 12 123 1234 12345678901 3.14 1,000",
    "a_b-c.d/e\\f {}[]()<>;:!?",
    "Hello  world \n\n\tdef f(x):\r\n        return x ** 2  # {}\n",
    "ab" * 2000,
)
_CONTROLS = ("\x00a\x00\x1f\x7f", "".join(map(chr, range(128))))
_SCRIPTS = (
    "naïve café ÀÉ Straße ŒUVRE İstanbul",
    "漢字かな交じり文，中文分词。 한국어 번체字",
    "🙂👩‍👩‍👧 🇩🇪 👍🏽",
    "Привет мир עברית العربية हिन्दी ไทย",
    "A\u030a \u00a0\u3000\u2003end\u200b\ufeff \ufb01 \u2460 \uff21 \u2581 \ufffd",
    "\U00020000 \U000e0100 \u0378",
)
ASCII_TEXTS = (*_BLANKS, *_WORDS, *_CONTROLS)


def build_text_probes(tokens: Sequence[str], *, scripts: bool = True) -> list[str]:
    """Short texts with all that tokenizers treat apart.

    Args:
        tokens: Texts of the added tokens; each is tried alone, glued to words, between blanks, and in small letters.
        scripts: With other scripts, emoji and combining characters, or ASCII beside the tokens only.
    """
    tokens = [token for token in tokens if token][:_MOST_TOKENS]
    embedded = [f"a {token} b{token}c{token}{token}\n{token.lower()}" for token in tokens]
    others = _SCRIPTS if scripts else ()
    return [*ASCII_TEXTS, *others, *tokens, *embedded]
