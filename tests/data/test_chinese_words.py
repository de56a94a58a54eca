"""Words of Chinese text are found in what tokens spell, whichever way a tokenizer cuts it."""

import itertools
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_7b.data.samples.chinese_words import ChineseWords, check_segmenter
from megatron_7b.data.samples.masking import Masker, Masking, find_word_beginnings
from megatron_7b.errors import ConfigError
from megatron_7b.tokenizer.byte_level import byte_characters

rjieba = pytest.importorskip("rjieba")
TEXT = "中国人民生活水平不断提高，北京大学的research小组发表了论文。"
WORDS = [
    "中国",
    "人民",
    "生活",
    "水平",
    "不断",
    "提高",
    "，",
    "北京大学",
    "的",
    "research",
    "小组",
    "发表",
    "了",
    "论文",
    "。",
]


def units(pieces: list[str], ids: list[int]) -> list[str]:
    """What is hidden together, spelled out as the pieces are."""
    masking = Masking(
        mask_id=len(pieces), vocab_size=len(pieces) + 1, segmenter=ChineseWords([*pieces, "[MASK]"]),
        begins_word=find_word_beginnings([*pieces, "[MASK]"]),
    )  # fmt: skip
    array = np.array(ids, dtype=np.int64)
    words = Masker(masking).words(array, np.ones(len(ids), dtype=bool))
    return ["".join(pieces[token] for token in ids[first : first + size]) for first, size in zip(*words, strict=True)]


def cut(pieces: list[str]) -> tuple[list[str], list[int]]:
    vocabulary = list(dict.fromkeys(pieces))
    return vocabulary, [vocabulary.index(piece) for piece in pieces]


def test_a_token_per_character() -> None:
    pieces = [*TEXT.partition("research")[0], "rese", "##arch", *TEXT.partition("research")[2]]
    assert [unit.replace("##", "") for unit in units(*cut(pieces))] == WORDS


def test_tokens_across_words_are_hidden_together() -> None:
    pieces = ["▁", "中国人", "民", "生活水", "平", "不断", "提", "高"]
    assert units(*cut(pieces)) == ["▁", "中国人民", "生活水平", "不断", "提高"]


def test_tokens_of_bytes() -> None:
    spelling = byte_characters()
    text = "".join(spelling[byte] for byte in (" a" + TEXT).encode())
    pieces = [text[begin : begin + 2] for begin in range(0, len(text), 2)]
    found = units(*cut(pieces))
    byte_of = {character: byte for byte, character in spelling.items()}
    assert b"".join(bytes(byte_of[c] for c in unit) for unit in found).decode() == " a" + TEXT
    assert len(found) < len(pieces) / 2


def test_no_word_reaches_across_what_is_no_text() -> None:
    segmenter = ChineseWords(["中", "国", "a"])
    begins = np.array([True] * 5)
    assert segmenter(np.array([0, 1, 0, -1, 1]), begins).tolist() == [True, False, True, True, True]
    assert segmenter(np.array([2, 2]), begins[:2]).tolist() == [True, True]


@given(cuts=st.sets(st.integers(1, len(TEXT) - 1)))
def test_words_are_the_finest_units_that_cut_no_token(cuts: set[int]) -> None:
    """Against the definition: a token begins a unit exactly if a word begins at its first character."""
    bounds = [0, *sorted(cuts), len(TEXT)]
    pieces = [TEXT[a:b] for a, b in itertools.pairwise(bounds)]
    starts = {0}
    for word in WORDS:
        starts.add(max(starts) + len(word))
    chinese = {at for at, character in enumerate(TEXT) if "\u4e00" <= character <= "\u9fff"}
    vocabulary, ids = cut([*pieces, "##x"])  # marks it as WordPiece, where every other piece begins a word
    begins = ChineseWords(vocabulary)(np.array(ids[:-1]), np.ones(len(pieces), dtype=bool))
    assert begins.tolist() == [a in starts or a not in chinese for a in bounds[:-1]]


def test_a_missing_segmenter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find: Any = lambda name: None  # noqa: E731
    monkeypatch.setattr(sys.modules["megatron_7b.data.samples.chinese_words"], "find_spec", find)
    with pytest.raises(ConfigError, match=r"(?s)rjieba is not installed.*megatron-7b\[chinese\]"):
        check_segmenter()
