"""What a record must be: every way in which a line can be bad, and none in which a good one is lost."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_7b.data import _index
from megatron_7b.data.reading import records
from megatron_7b.data.reading.blocks import Block
from megatron_7b.data.reading.records import parse_block
from megatron_7b.data.reading.sources import Source
from megatron_7b.errors import DataFormatError
from megatron_7b.tokenizer.checked import find_unknown_slowly

FILE = Path("corpus.jsonl")

BAD_LINES = [
    (b"plain words", "not JSON"),
    (b'{"text": "cut', "not JSON"),
    (b'{"text": "a"} {"text": "b"}', "not JSON: Extra data"),
    (b'{"text": "\xff"}', "invalid UTF-8: byte 0xff at column 11"),
    (b'{"text": "\xed\xa0\x80"}', "invalid UTF-8"),
    (b'{"text": "a\tb"}', "not JSON: Invalid control character"),
    (b'{"other": "a", "b": 1}', "key 'text' is missing; there are 'other', 'b'"),
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
        "key 'b' is missing; there are 'a'",
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
        whole = parse_block(Block(kind, file, 1, file.read_bytes()), ("text",))
        blocks = list(source.read_blocks(("text",), kind, size))
        parts = [parse_block(block, ("text",)) for block in blocks]
        assert [text for part in parts for text in part.texts[0]] == whole.texts[0]
        assert [number for part in parts for number in part.numbers] == whole.numbers
        assert b"".join(block.data for block in blocks) == file.read_bytes()


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=8,
)
RECORDS = st.builds(
    lambda text, others, indent: json.dumps({**others, "text": text}, **indent).encode("utf-8", "surrogatepass"),
    st.one_of(st.text(), st.text(min_size=15, max_size=70), JSON),
    st.dictionaries(st.sampled_from(["text", "a", "b", "\u00e9", "te"]), JSON, max_size=3),
    st.sampled_from([{}, {"ensure_ascii": False}, {"separators": (",", ":")}, {"separators": (" ,\t", " : ")}]),
)


def parse_by_general_parser(data: bytes, *keys: str) -> tuple[list[list[str]], list[int], int]:
    """Every line as a doubt."""
    texts: list[list[str]] = [[] for _ in keys]
    numbers, num_bad = [], 0
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line or line.isspace():
            continue
        values = records._examine(line, keys)
        if isinstance(values, str):
            num_bad += 1
            continue
        for of_key, value in zip(texts, values, strict=True):
            of_key.append(value)
        numbers.append(number)
    return texts, numbers, num_bad


@given(st.lists(RECORDS, max_size=5), st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), max_size=3))
@settings(max_examples=150)
def test_the_scanner_agrees_with_general_parsers(lines: list[bytes], damage: list[tuple[int, int]]) -> None:
    """Also on lines with wrong bytes in them: whatever it calls certain, they read the same."""
    data = bytearray(b"\n".join(lines))
    for position, byte in damage:
        if position < len(data):
            data[position] = byte
    for keys in (["text"], ["a", "text"]):
        texts, numbers, bad = parse(bytes(data), *keys)
        assert (texts, numbers, len(bad)) == parse_by_general_parser(bytes(data), *keys)


def test_the_scanner_is_certain_of_what_is_plain() -> None:
    """Else all would be right, and slow."""
    plain: list[dict[str, object]] = [
        {"text": 'a"b\\c/\b\f\n\r\t\u00e9\u4e00\U0001f600'},
        {"n": [1, -2.5, 0.25, {"m": None}], "b": True, "c": False, "d": "", "text": ""},
    ]
    for record in plain:
        for ascii_only in (True, False):
            line = json.dumps(record, ensure_ascii=ascii_only).encode()
            texts, lines, doubts = _index.parse_jsonl(line, ["text"])
            assert (texts, lines, doubts) == ([[record["text"]]], [0], [])
    unsure = [
        b'{"text": "a", "text": "b"}',
        b'{"text": "a", "x": 1e5}',
        b'{"text": "\\ud800"}',
        b"[]",
        b'{"te\\u0078t": "a"}',
    ]
    for line in unsure:
        assert _index.parse_jsonl(line, ["text"])[2] == [(0, 0, 0, len(line))]
    assert _index.parse_jsonl(b" \r\n\t\n", ["text"]) == ([[]], [], [])


@given(
    st.lists(st.lists(st.integers(0, 60_000), max_size=5), max_size=8),
    st.sampled_from([2, 4]),
    st.sampled_from([None, 1]),
    st.sampled_from([None, 2]),
)
def test_framing(documents: list[list[int]], token_bytes: int, bos: int | None, eod: int | None) -> None:
    ids = np.array([one for document in documents for one in document], np.uint32)
    lengths = np.array([len(document) for document in documents], np.int64)
    framed, framed_lengths = _index.frame_documents(ids, lengths, token_bytes, bos, eod)
    before, behind = [bos] * (bos is not None), [eod] * (eod is not None)
    expected = [[*before, *document, *behind] if document else [] for document in documents]
    assert framed.dtype == (np.uint16 if token_bytes == 2 else np.int32)
    assert framed.tolist() == [one for document in expected for one in document]
    assert framed_lengths.tolist() == [len(document) for document in expected]


def test_framing_refuses_what_does_not_fit() -> None:
    with pytest.raises(DataFormatError, match="id 65536, which 2 bytes do not hold"):
        _index.frame_documents(np.array([65536], np.uint32), np.array([1]), 2, None, None)
    for lengths in ([2], [-1], []):
        with pytest.raises(ValueError, match="length"):
            _index.frame_documents(np.array([1], np.uint32), np.array(lengths, np.int64), 2, None, 0)


@given(st.text(), st.sets(st.characters()))
def test_unknown_characters_are_found(text: str, known: set[str]) -> None:
    table = np.zeros(0x110000, np.bool_)
    table[:128] = True
    table[[ord(character) for character in known]] = True
    text = text.encode("utf-8", "ignore").decode()
    assert _index.find_unknown(text, table) == find_unknown_slowly(text, table)
