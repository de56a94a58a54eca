"""Sentences of scripts that have no spaces, and the names of languages."""

from pathlib import Path

import pytest
from nltk import data as nltk_data

from megatron_7b.data.preprocess.sentences import build_sentence_splitter, split_without_spaces
from megatron_7b.data.reading.sources import find_sources
from tests.support.assets import asset


@pytest.mark.parametrize(
    "sentences",
    [
        ["今天天气很好。", "我们去公园吧！", "你去吗？"],
        ["“走吧！”", "他说。", "她没有回答……", "“为什么？！”"],
        ["他说：“我不知道。”", "（谁知道呢？）", "《红楼梦》是一部小说。"],
        ['他问:"去哪里?"', '"回家。"', "她说。"],
        ["版本3.5发布了，网址是https://a.cn/s?q=1&b=2。", "大小为1.5GB"],
        ["等等…我想想。", "好！！！", "行"],
        ["今日は晴れです。", "「行こう。」", "と言った。"],
        ["没有标点的一行"],
    ],
)
def test_sentences_end_at_their_marks_with_what_these_close(sentences: list[str]) -> None:
    assert split_without_spaces("".join(sentences)) == sentences


def test_a_line_ends_a_sentence_and_space_belongs_to_none() -> None:
    assert split_without_spaces("标题\n\n　第一句。 第二句。\r\n") == ["标题", "第一句。", "第二句。"]
    assert split_without_spaces(" \n ") == []


def test_a_language_goes_by_its_name_or_its_code_and_borders_are_learned_where_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Er kam. Wir gingen. Ihr bliebt.")

    def origin(language: str) -> str:
        return build_sentence_splitter(find_sources([str(text)]), "text", language, "file")[1]

    assert origin("zh") == origin("chinese") == "the marks that end them in chinese"
    monkeypatch.setattr(nltk_data, "path", [str(asset("nltk_data"))])
    assert origin("de") == origin("german") == "nltk_data's model for german"
    assert origin("learned") == "learned from the corpus's first 31 characters"
    monkeypatch.setattr(nltk_data, "path", [])
    assert origin("de") == "learned from the corpus's first 31 characters (no nltk_data for german)"
