"""Blocks to texts: what each kind of record must look like, and what is wrong with those that don't."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import orjson

from megatron_7b.data._index import parse_jsonl
from megatron_7b.data.reading.blocks import Block

_LINE_END = re.compile(rb"\n")
# Also before the first paragraph: where a block begins is no concern of its documents.
_BLANK_LINES = re.compile(rb"(?:\A|\n)(?:[ \t\r]*\n)+")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that is left out."""

    source: Path
    number: int
    """Line or row, from 1."""
    reason: str

    def __str__(self) -> str:
        return f"{self.source}:{self.number}: {self.reason}"


@dataclass(slots=True)
class ParsedBlock:
    """Texts of a block: `texts[k][i]` is key k of good record i, which is record `numbers[i]` of the source."""

    texts: list[list[str]]
    numbers: list[int] = field(default_factory=list)
    bad: list[BadRecord] = field(default_factory=list)


def parse_block(block: Block, keys: Sequence[str]) -> ParsedBlock:
    """Take the texts out of a block. A record is good only if all its keys are, so that the datasets stay aligned."""
    match block.kind:
        case "jsonl":
            return _parse_jsonl(block, keys)
        case "rows":
            return _parse_rows(block, keys)
        case _:
            return _parse_text(block)


def _parse_jsonl(block: Block, keys: Sequence[str]) -> ParsedBlock:
    texts, lines, doubts = parse_jsonl(block.data, list(keys))
    certain = ParsedBlock(texts, [block.first_record + line for line in lines])
    return _settle_doubts(block, keys, certain, doubts) if doubts else certain


def _settle_doubts(
    block: Block, keys: Sequence[str], certain: ParsedBlock, doubts: Sequence[tuple[int, int, int, int]]
) -> ParsedBlock:
    """Put the records in between that the scanner left to a general parser, and say what is wrong with the others."""
    parsed = ParsedBlock([[] for _ in keys])
    start = 0
    for before, line, begin, end in doubts:
        for all_texts, texts in zip(parsed.texts, certain.texts, strict=True):
            all_texts += texts[start:before]
        parsed.numbers += certain.numbers[start:before]
        start = before
        number, data = block.first_record + line, bytes(block.data[begin:end])
        if data.isspace():
            continue
        values = _examine(data, keys)
        if isinstance(values, str):
            parsed.bad.append(BadRecord(block.source, number, values))
            continue
        for all_texts, value in zip(parsed.texts, values, strict=True):
            all_texts.append(value)
        parsed.numbers.append(number)
    for all_texts, texts in zip(parsed.texts, certain.texts, strict=True):
        all_texts += texts[start:]
    parsed.numbers += certain.numbers[start:]
    return parsed


_NOT_PARSED = object()


def _examine(line: bytes, keys: Sequence[str]) -> list[str] | str:
    """Return the values of the keys, or what is wrong, in words."""
    try:
        record = orjson.loads(line)
    except ValueError:
        try:
            # The standard parser takes what orjson refuses and Megatron's readers take: NaN, huge numbers, and lone
            # surrogates, which are harmless in a key that is not read.
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            return f"invalid UTF-8: byte 0x{error.object[error.start]:02x} at column {error.start + 1}"
        except json.JSONDecodeError as error:
            return f"not JSON: {error.msg} at column {error.colno}"
        except (RecursionError, ValueError) as error:
            return f"not JSON that can be read: {error}"
    if not isinstance(record, dict):
        return f"expected a JSON object, got {_describe(record)}"
    values = [record.get(key, _NOT_PARSED) for key in keys]
    for key, value in zip(keys, values, strict=True):
        if (reason := _find_fault(key, value)) is not None:
            return reason if value is not _NOT_PARSED else f"{reason}; there are {_name_keys(record)}"
    return values


def _name_keys(record: dict[str, object]) -> str:
    return ", ".join(repr(name[:40]) for name in list(record)[:10]) or "none"


def _find_fault(key: str, value: object) -> str | None:
    if value is _NOT_PARSED:
        return f"key {key!r} is missing"
    if not isinstance(value, str):
        return f"key {key!r} is {_describe(value)}, expected a string"
    if not value.isascii() and (surrogate := _SURROGATE.search(value)):
        return f"key {key!r} has a lone surrogate \\u{ord(surrogate.group()):04x} at character {surrogate.start() + 1}"
    return None


def _describe(value: object) -> str:
    names: dict[type, str] = {dict: "an object", list: "a list", int: "a number", float: "a number", bytes: "not UTF-8"}
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return names.get(type(value), "a string" if isinstance(value, str) else type(value).__name__)


def _parse_rows(block: Block, keys: Sequence[str]) -> ParsedBlock:
    from megatron_7b.data.reading.parquet import get_column

    parsed = ParsedBlock([[] for _ in keys])
    columns = [get_column(block.rows, key) for key in keys]
    for number, values in enumerate(zip(*columns, strict=True), start=block.first_record):
        faults = (_find_fault(key, value) for key, value in zip(keys, values, strict=True))
        reason = next((fault for fault in faults if fault is not None), None)
        if reason is not None:
            parsed.bad.append(BadRecord(block.source, number, reason))
            continue
        for texts, value in zip(parsed.texts, values, strict=True):
            texts.append(str(value))
        parsed.numbers.append(number)
    return parsed


def _parse_text(block: Block) -> ParsedBlock:
    parsed = ParsedBlock([[]])
    for number, data in _cut_documents(block):
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            line = number + data.count(b"\n", 0, error.start)
            reason = f"invalid UTF-8: byte 0x{data[error.start]:02x}, so the document from line {number} on is left out"
            parsed.bad.append(BadRecord(block.source, line, reason))
            continue
        parsed.texts[0].append(text)
        parsed.numbers.append(number)
    return parsed


def _cut_documents(block: Block) -> Iterator[tuple[int, bytes]]:
    """Yield the documents of plain text with the line that each begins at; blank ones do not count."""
    data = bytes(block.data)
    if block.kind == "file":
        if data.strip():
            yield 1, data.removeprefix(b"\xef\xbb\xbf")
        return
    separator = _LINE_END if block.kind == "line" else _BLANK_LINES
    borders = [match.span() for match in separator.finditer(data)]
    number, start = block.first_record, 0
    for end, next_start in [*borders, (len(data), len(data))]:
        piece = data[start:end]
        document = piece.lstrip(b"\r\n")
        if document.strip():
            yield number + piece.count(b"\n", 0, len(piece) - len(document)), document.rstrip(b"\r\n")
        number += data.count(b"\n", start, next_start)
        start = next_start
