"""Sentences of scripts that have no spaces."""

import pytest

from megatron_7b.data.preprocess.sentences import split_without_spaces


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
