"""Words of Chinese text, which is written without blanks: found by jieba's dictionary in what the tokens spell.

A tokenizer of BERT's kind has a token per Chinese character, others cut elsewhere. Here each row is spelled out again,
runs of Chinese characters are divided into words, and a token begins a word where its first byte does. Tokens of which
one ends within a word and another one within the next belong to one unit: words are always hidden with all their
tokens. What is not Chinese begins and continues words as the vocabulary says.

rjieba is jieba in Rust, with its dictionary in the package; nothing is fetched. Runs are remembered, as every text
comes again in the next epoch and in each of its masks.
"""

import functools
import re
from collections.abc import Iterator, Sequence
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from megatron_7b.data.samples.masking import is_word_piece
from megatron_7b.errors import ConfigError
from megatron_7b.tokenizer.byte_level import byte_characters

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_BREAK = b"\n"
"""Stands for what is no text, so that no run reaches across it."""
_REMEMBERED_RUNS = 1 << 17
_CHINESE = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF))
"""Code points of Chinese characters, the blocks of Unicode that are called CJK ideographs."""


def check_segmenter() -> None:
    """Refuse to go on without the segmenter.

    Raises:
        ConfigError: It is not installed.
    """
    if find_spec("rjieba") is None:
        raise ConfigError(
            "objective.word_segmenter is jieba, but the package rjieba is not installed",
            hint="pip install 'megatron-7b[chinese]', or leave objective.word_segmenter out: every token of Chinese "
            "text is then a word",
        )


class ChineseWords:
    """Says which tokens of a text begin a word."""

    def __init__(self, pieces: Sequence[str]) -> None:
        """Prepare for a tokenizer.

        Args:
            pieces: How each token is spelled in the vocabulary, in the order of the ids.

        Raises:
            ConfigError: The segmenter is not installed.
        """
        check_segmenter()
        self._bytes = list(_spelled_bytes(pieces))

    def __call__(self, ids: NDArray[np.int64], begins: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return which tokens begin a word.

        Args:
            ids: Of one sample, [s]; -1 where it is no text.
            begins: Which tokens the vocabulary says begin one, [s].

        Returns:
            [s].
        """
        spelled = [self._bytes[token] if token >= 0 else _BREAK for token in ids.tolist()]
        ends = np.cumsum([len(piece) for piece in spelled])
        text = b"".join(spelled).decode("utf-8", "surrogateescape")
        code_points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        is_chinese = np.zeros(len(code_points) + 2, dtype=bool)
        for low, high in _CHINESE:
            is_chinese[1:-1] |= (code_points >= low) & (code_points <= high)
        if not is_chinese.any():
            return begins
        begins_here = np.zeros(len(code_points), dtype=bool)
        borders = np.flatnonzero(is_chinese[1:] != is_chinese[:-1])
        for begin, end in borders.reshape(-1, 2).tolist():
            begins_here[begin + np.array(_word_starts(text[begin:end]))] = True
        # Which character a token begins with, and whether it begins within one.
        places = np.cumsum(_num_bytes(code_points))
        first_bytes = ends - [len(piece) for piece in spelled]
        character = np.minimum(np.searchsorted(places, first_bytes, side="right"), len(code_points) - 1)
        is_at_start = first_bytes == np.where(character > 0, places[character - 1], 0)
        of_chinese = is_chinese[1:-1][character]
        after_chinese = is_chinese[character]  # shifted by one: of the character before
        return np.where(of_chinese, begins_here[character] & is_at_start, begins | after_chinese)


@functools.lru_cache(maxsize=_REMEMBERED_RUNS)
def _word_starts(run: str) -> tuple[int, ...]:
    """Return where the words of a run of Chinese characters begin."""
    from rjieba import cut

    starts = [0]
    for word in cut(run):
        starts.append(starts[-1] + len(word))
    return tuple(starts[:-1])


def _num_bytes(code_points: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Return how many bytes of the text each character is; a lone surrogate stands for one that is no UTF-8."""
    sizes = 1 + (code_points >= 0x80).astype(np.int64) + (code_points >= 0x800) + (code_points >= 0x10000)
    return np.where((code_points >= 0xDC80) & (code_points <= 0xDCFF), 1, sizes)


def _spelled_bytes(pieces: Sequence[str]) -> Iterator[bytes]:
    """Yield the text of each token, in UTF-8."""
    word_piece = is_word_piece(pieces)
    byte_level = not word_piece and any(piece.startswith("Ġ") for piece in pieces)
    byte_of = {character: byte for byte, character in byte_characters().items()}
    for piece in pieces:
        if word_piece:
            yield piece.removeprefix("##").encode()
        elif byte_level and byte_of.keys() >= set(piece):
            yield bytes(map(byte_of.__getitem__, piece))
        elif match := _BYTE_TOKEN.fullmatch(piece):
            yield bytes([int(match[1], 16)])
        else:
            yield piece.replace("▁", " ").encode()
