"""Pieces of files to documents. What cannot be read is handed on with the reason, never skipped."""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from megatron_7b.data.reading.blocks import Block, BlockKind
from megatron_7b.data.reading.records import parse_block
from megatron_7b.data.reading.sources import Source
from megatron_7b.errors import DataFormatError
from megatron_7b.prepare.document import Document, Removed
from megatron_7b.prepare.document_sections import ReadingSection
from megatron_7b.prepare.extras import import_zstd
from megatron_7b.prepare.reading.extraction import decode_html
from megatron_7b.prepare.reading.inputs import Piece

BLOCK_BYTES = 1 << 20
_HEAD_BYTES = 200
_BAD_TOLERATED = 10


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Not a record: a line of `quarantine.jsonl`."""

    source: str
    position: int
    """Line or row, from 1; of a WARC file, the byte at which the record begins."""
    reason: str
    head: str
    """Its first bytes, those that are not UTF-8 as escapes."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """A record that can be read and is no document: a page that was not found, a picture."""

    document: Document
    removed: Removed


type Record = Document | Unreadable | Dropped


def read_piece(piece: Piece, section: ReadingSection, unpacked: Path = Path()) -> Iterator[Record]:
    """Yield all records of a piece in order.

    Args:
        piece: What to read.
        section: How.
        unpacked: Folder of the parts of unpacked files.

    Raises:
        DataFormatError: The file is damaged as a whole (cut compression, not parquet, a missing column), or so many of
            its records are unreadable that something else must be wrong.
    """
    readers = {"parquet": _read_parquet, "html": _read_html, "warc": _read_warc}
    reader = readers.get(piece.file.format, _read_blocks)
    records = bad = 0
    first_bad: Unreadable | None = None
    for record in reader(piece, section, unpacked):
        records += 1
        if isinstance(record, Unreadable):
            bad += 1
            first_bad = first_bad or record
        yield record
    # Asked at the end: only then is it known how large a share they are.
    if first_bad is not None and (bad == records or bad > max(_BAD_TOLERATED, section.max_bad_fraction * records)):
        raise DataFormatError(
            f"{piece.file.path}: {bad} of {records} records cannot be read, the first in line or record "
            f"{first_bad.position}: {first_bad.reason}\n  {first_bad.head}",
            hint="--reading.text-key names the key of the text; --reading.max-bad-fraction says how many may be bad",
        )


def _read_blocks(piece: Piece, section: ReadingSection, unpacked: Path) -> Iterator[Record]:
    if piece.end is None:
        path = unpacked / piece.part if piece.part else Path(piece.file.path)
        blocks = Source(path).read_blocks((section.text_key,), section.text_documents, BLOCK_BYTES)
        blocks = (replace(block, first_record=block.first_record + piece.first_record - 1) for block in blocks)
    else:
        blocks = _read_range(piece)
    for block in blocks:
        if piece.file.format == "jsonl":
            yield from _parse_lines(block, piece, section)
        else:
            yield from _parse_text(block, piece)


def _read_range(piece: Piece) -> Iterator[Block]:
    """Yield blocks of whole lines between two bytes of an uncompressed file."""
    assert piece.end is not None
    kind: BlockKind = "jsonl" if piece.file.format == "jsonl" else "line"
    path, first = Path(piece.file.path), piece.first_record
    with path.open("rb") as stream:
        stream.seek(piece.start)
        left = piece.end - piece.start
        while left > 0:
            data = stream.read(min(BLOCK_BYTES, left))
            if not data:
                raise DataFormatError(f"{path} has become shorter while it was read")
            left -= len(data)
            if left > 0 and not data.endswith(b"\n"):
                rest = stream.readline()
                data, left = data + rest, left - len(rest)
            yield Block(kind, path, first, data)
            first += data.count(b"\n")


def _parse_lines(block: Block, piece: Piece, section: ReadingSection) -> Iterator[Record]:
    path, key, is_html = piece.file.path, section.text_key, section.html_key
    for number, line in enumerate(bytes(block.data).split(b"\n"), start=block.first_record):
        try:
            fields = orjson.loads(line)
            text = fields.pop(key)
            if type(text) is str:
                yield Document(text, path, number, fields, is_html)
                continue
        except (ValueError, KeyError, TypeError, AttributeError):
            if not line or line.isspace():
                continue
        yield _examine(line, number, piece, section)


def _examine(line: bytes, number: int, piece: Piece, section: ReadingSection) -> Document | Unreadable:
    """Return a document that the fast way did not take (NaN, huge numbers), or what is wrong with the line."""
    parsed = parse_block(Block("jsonl", Path(piece.file.path), number, line), (section.text_key,))
    if parsed.bad:
        return Unreadable(piece.file.path, number, parsed.bad[0].reason, _head(line))
    fields = json.loads(line)
    return Document(fields.pop(section.text_key), piece.file.path, number, fields, section.html_key)


def _parse_text(block: Block, piece: Piece) -> Iterator[Record]:
    parsed = parse_block(block, ("text",))
    found: list[Document | Unreadable] = [
        Document(text, piece.file.path, number) for number, text in zip(parsed.numbers, parsed.texts[0], strict=True)
    ]
    if parsed.bad:
        lines = bytes(block.data).split(b"\n")
        for bad in parsed.bad:
            head = _head(lines[bad.number - block.first_record])
            found.append(Unreadable(piece.file.path, bad.number, bad.reason, head))
        found.sort(key=lambda record: record.position)
    yield from found


def _read_parquet(piece: Piece, section: ReadingSection, unpacked: Path) -> Iterator[Record]:  # noqa: ARG001  # see _read_html
    from megatron_7b.prepare.reading.parquet_rows import read_rows

    path = piece.file.path
    rows = read_rows(path, section.text_key, piece.start, piece.end, piece.rows)
    for number, fields in enumerate(rows, start=piece.first_record):
        text = fields.pop(section.text_key)
        if isinstance(text, bytes):
            with suppress(UnicodeDecodeError):  # a binary column may hold nothing but text
                text = text.decode()
        if isinstance(text, str):
            yield Document(text, path, number, fields, section.html_key)
        elif isinstance(text, bytes):
            yield Unreadable(path, number, f"column {section.text_key!r} is not UTF-8", _head(text))
        else:
            yield Unreadable(path, number, f"column {section.text_key!r} is {text!r:.40}, expected a string", "")


def _read_html(piece: Piece, section: ReadingSection, unpacked: Path) -> Iterator[Record]:  # noqa: ARG001  # one signature for all readers
    data = Path(piece.file.path).read_bytes()
    yield Document(decode_html(data), piece.file.path, 1, is_html=True)


def _read_warc(piece: Piece, section: ReadingSection, unpacked: Path) -> Iterator[Record]:  # noqa: ARG001  # see _read_html
    from megatron_7b.prepare.reading.warc import HTTP_OK, BadRecord, read_warc, read_warc_bytes

    if piece.part:
        with import_zstd().ZstdFile(unpacked / piece.part) as file:
            records = read_warc_bytes(file.read(), piece.first_record)
    else:
        records = read_warc(Path(piece.file.path), piece.start, piece.end)
    for record in records:
        if isinstance(record, BadRecord):
            yield Unreadable(piece.file.path, record.position, record.reason, _head(record.head))
            continue
        fields: dict[str, Any] = {"url": record.url, "date": record.date, "http_status": record.status}
        fields = {name: value for name, value in fields.items() if value is not None}
        document = Document("", piece.file.path, record.position, fields, record.is_html)
        if record.is_document:
            document.text = decode_html(record.body, record.charset)
            yield document
        elif record.status not in (None, HTTP_OK):
            yield Dropped(document, Removed("reading:http_status", f"{record.status} of {record.url}"))
        else:
            yield Dropped(document, Removed("reading:content_type", f"{record.content_type!r} of {record.url}"))


def _head(data: bytes) -> str:
    return data[:_HEAD_BYTES].decode(errors="backslashreplace")
