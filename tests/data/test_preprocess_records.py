"""What a record must be: every way in which a line can be bad, and none in which a good one is lost."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_7b.data.preprocess.records import parse_block
from megatron_7b.data.preprocess.sources import Block, Source

FILE = Path("corpus.jsonl")

BAD_LINES = [
    (b"plain words", "not JSON"),
    (b'{"text": "cut', "not JSON"),
    (b'{"text": "a"} {"text": "b"}', "not JSON: Extra data"),
    (b'{"text": "\xff"}', "invalid UTF-8: byte 0xff at column 11"),
    (b'{"text": "\xed\xa0\x80"}', "invalid UTF-8"),
    (b'{"text": "a\tb"}', "not JSON: Invalid control character"),
    (b'{"other": "a"}', "key 'text' is missing"),
    (b'{"text": null}', "key 'text' is null, expected a string"),
    (b'{"text": 5}', "key 'text' is a number"),
    (b'{"text": ["a"]}', "key 'text' is a list"),
    (b'{"text": true}', "key 'text' is true"),
    (b'["text"]', "expected a JSON object, got a list"),
    (b'"text"', "expected a JSON object, got a string"),
    (b"1", "expected a JSON object, got a number"),
    (b'{"text": "a\\ud800b"}', r"lone surrogate \ud800 at character 2"),
    (b'{"text": "\\udc00\\ud800"}', r"lone surrogate \udc00 at character 1"),
    (b"[" * 200_000, "not JSON"),
]


def parse(data: bytes, *keys: str, kind: str = "jsonl") -> tuple[list[list[str]], list[int], list[str]]:
    parsed = parse_block(Block(kind, FILE, 1, data), keys or ("text",))  # type: ignore[arg-type]
    return parsed.texts, parsed.numbers, [str(bad) for bad in parsed.bad]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES, ids=[reason for _, reason in BAD_LINES])
def test_a_bad_line_is_named_and_its_neighbours_stay(line: bytes, reason: str) -> None:
    texts, numbers, bad = parse(b'{"text": "before"}\n' + line + b'\n{"text": "after"}')
    assert texts == [["before", "after"]]
    assert numbers == [1, 3]
    assert len(bad) == 1
    assert bad[0].startswith("corpus.jsonl:2: ")
    assert reason in bad[0]


@pytest.mark.parametrize(
    "line",
    [
        b'{"text": "a", "score": NaN}',
        b'{"score": [Infinity, -Infinity], "text": "a"}',
        b'{"other": "\\ud800", "text": "a"}',
        b'  {"text": "a"}  \r',
        b'{"text": "b", "text": "a"}',
        b'{"text": "\\u0061", "id": 123456789012345678901234567890}',
    ],
)
def test_what_other_readers_take_is_taken(line: bytes) -> None:
    assert parse(line) == ([["a"]], [1], [])


def test_blank_lines_are_no_records() -> None:
    assert parse(b'\n \t\r\n{"text": ""}\n\n') == ([[""]], [3], [])


def test_several_keys_stay_aligned() -> None:
    data = b'{"a": "1", "b": "2"}\n{"a": "3"}\n{"a": "4", "b": 5}\n{"a": "6", "b": "7"}\n'
    texts, numbers, bad = parse(data, "a", "b")
    assert texts == [["1", "6"], ["2", "7"]]
    assert numbers == [1, 4]
    assert [reason.split(": ", 1)[1] for reason in bad] == [
        "key 'b' is missing",
        "key 'b' is a number, expected a string",
    ]


@given(st.lists(st.text(), max_size=20), st.booleans())
def test_any_text_survives(texts: list[str], ascii_only: bool) -> None:
    good = [text.encode("utf-8", "ignore").decode() for text in texts]
    data = b"".join(json.dumps({"text": text}, ensure_ascii=ascii_only).encode() + b"\n" for text in good)
    assert parse(data)[0] == [good]


@given(st.binary(max_size=300))
@settings(max_examples=300)
def test_any_bytes_give_records_or_reasons(data: bytes) -> None:
    texts, numbers, bad = parse(data)
    filled = [line for line in data.split(b"\n") if line and not line.isspace()]
    assert len(numbers) + len(bad) == len(filled)
    assert all(text.encode() is not None for text in texts[0])


def test_plain_text_is_cut_as_asked() -> None:
    data = b"\n\none\ntwo\n\n \t\nthree\r\n\r\nfour\xff\n\nfive\n"
    assert parse(data.replace(b"\xff", b""), kind="line")[0] == [["one", "two", "three", "four", "five"]]
    texts, numbers, bad = parse(data, kind="paragraph")
    assert texts == [["one\ntwo", "three", "five"]]
    assert numbers == [3, 7, 11]
    assert len(bad) == 1
    assert "corpus.jsonl:9" in bad[0]
    whole = "\ufeffone\n\n two \n".encode()
    assert parse(whole, kind="file")[0] == [["one\n\n two \n"]]
    assert parse(b" \n", kind="file") == ([[]], [], [])


@given(st.lists(st.sampled_from(["", "word", "two words", "é" * 30, "\r"])), st.integers(1, 64))
def test_blocks_of_any_size_give_the_same_documents(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], size: int
) -> None:
    file = tmp_path_factory.getbasetemp() / "blocks.txt"
    file.write_bytes("\n".join(lines).encode())
    source = Source(file)
    for kind in ("line", "paragraph"):
        whole = parse_block(Block(kind, file, 1, file.read_bytes()), ("text",))  # type: ignore[arg-type]
        blocks = list(source.read_blocks(("text",), kind, size))  # type: ignore[arg-type]
        parts = [parse_block(block, ("text",)) for block in blocks]
        assert [text for part in parts for text in part.texts[0]] == whole.texts[0]
        assert [number for part in parts for number in part.numbers] == whole.numbers
        assert b"".join(block.data for block in blocks) == file.read_bytes()
