"""WARC files (ISO 28500): web pages with their headers, read with FastWARC.

FastWARC ends without a word where a file is cut off, and gives up at the first damaged record. Here a damaged record is
handed on as such and reading continues after it, and a file that does not end as it should ends in such a record too.
"""

import io
import mmap
import re
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_7b.prepare.extras import import_extra
from megatron_7b.prepare.reading.http_bodies import decode_body

_GZIP_MAGIC = b"\x1f\x8b\x08"
RECORD_MAGIC = b"WARC/1."
_RECORD_END = b"\r\n\r\n"
_HTML_TYPES = ("text/html", "application/xhtml+xml")
_HTML_BEGINNINGS = (b"<!doctype html", b"<html")
_CONTENT_LENGTH = re.compile(rb"\r\nContent-Length:[ \t]*(\d+)", re.IGNORECASE)
HTTP_OK = 200
_CHUNK_BYTES = 1 << 20
_HEAD_BYTES = 200


@dataclass(frozen=True, slots=True)
class WarcPage:
    """A page, or a text that somebody extracted from one (WET)."""

    position: int
    """Byte at which the record begins in the file, as it is on disk (what indices of archives call offset)."""
    url: str | None
    date: str | None
    status: int | None
    """Of HTTP; None for conversions."""
    content_type: str
    charset: str | None
    """As the server named it."""
    body: bytes

    @property
    def is_html(self) -> bool:
        """Whether the body is markup."""
        return self.content_type in _HTML_TYPES

    @property
    def is_document(self) -> bool:
        """Whether it is a text that a server had; of all else the body is not read."""
        return self.status in (None, HTTP_OK) and (self.is_html or self.content_type == "text/plain")


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that cannot be read."""

    position: int
    reason: str
    head: bytes


def read_warc(path: Path, start: int = 0, end: int | None = None) -> Iterator[WarcPage | BadRecord]:
    """Responses, resources and conversions of a .warc file, or of a .warc.gz file with a member per record, in order.

    Args:
        path: The file.
        start: Byte at which the first record begins.
        end: Byte at which the first record begins that is not wanted; None for the end of the file.

    Raises:
        ConfigError: FastWARC is not installed.
    """
    with _map(path) as data:
        yield from _Reader(data).read(start, len(data) if end is None else end)


def read_warc_bytes(data: bytes, offset: int) -> Iterator[WarcPage | BadRecord]:
    """Read as `read_warc`, but records that begin at byte `offset` of a file."""
    for record in _Reader(data).read(0, len(data)):
        yield replace(record, position=offset + record.position)


def find_borders(path: Path, limit: int) -> list[int]:
    """Return where records begin, about `limit` bytes apart, the first and the last byte of the file among them."""
    with _map(path) as data:
        return _Reader(data).find_borders(limit)


def holds_many_records_per_member(path: Path) -> bool:
    """Return whether a .warc.gz file is one that a general gzip made: it can be read from its beginning only."""
    with _map(path) as data:
        decompressor = zlib.decompressobj(16 + zlib.MAX_WBITS)
        held, size, end = b"", 0, None
        for position in range(0, len(data), _CHUNK_BYTES):
            try:
                chunk = decompressor.decompress(data[position : position + _CHUNK_BYTES])
            except zlib.error:
                return False
            size += len(chunk)
            if end is None:
                held += chunk
                end = find_record_end(held, 0, is_whole=False)
            if end is not None and size > end:
                return True
            if decompressor.eof or (end is None and len(held) > _CHUNK_BYTES):
                return False
    return False


def find_record_end(data: bytes | mmap.mmap, start: int, *, is_whole: bool = True) -> int | None:
    """Behind the uncompressed record that begins at `start`; None where that cannot be told, or is not in `data`.

    Args:
        data: Records.
        start: Where one begins.
        is_whole: Whether an end outside `data` does not count as one.
    """
    header_end = data.find(_RECORD_END, start)
    length = _CONTENT_LENGTH.search(data[start:header_end]) if header_end >= 0 else None
    if length is None:
        return None
    end = header_end + len(_RECORD_END) + int(length.group(1))
    if end > len(data):
        return None if is_whole else end + len(_RECORD_END)
    return end + len(_RECORD_END) if data[end : end + len(_RECORD_END)] == _RECORD_END else end


@contextmanager
def _map(path: Path) -> Iterator[mmap.mmap | bytes]:
    if path.stat().st_size == 0:
        yield b""  # nothing can be mapped of it
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


class _Reader:
    def __init__(self, data: mmap.mmap | bytes) -> None:
        self._data = data
        self._is_gzip = data[: len(_GZIP_MAGIC)] == _GZIP_MAGIC
        self._magic = _GZIP_MAGIC if self._is_gzip else RECORD_MAGIC
        self._warc = import_extra("fastwarc.warc", "reading WARC files")
        self._end = len(data)
        self._last_start: int | None = None
        """Where the last record began whose headers could be read."""
        self._held: WarcPage | BadRecord | None = None
        """Of the last record: whether it is whole is only known when the next one begins."""

    def read(self, begin: int, end_of_piece: int) -> Iterator[WarcPage | BadRecord]:
        self._end = end_of_piece
        start: int | None = begin
        while start is not None and start < self._end:
            error, goes_on = None, False
            try:
                goes_on = yield from self._read_from(start)
            except OSError as caught:
                error = caught
            end = start if self._last_start is None else self._find_end(self._last_start)
            if end is None:
                self._held = self._held and BadRecord(
                    self._held.position, "the file is cut off within this record", b""
                )
            if self._held is not None:
                yield self._held
            self._held = None
            rest = b"" if end is None or end >= self._end else self._data[end : end + _HEAD_BYTES]
            start = end if goes_on and rest else None
            if start is None and rest.strip(b"\r\n\0"):
                assert end is not None
                yield BadRecord(end, f"no WARC record at byte {end}: {error or 'the file is cut off'}", rest)
                start = self._find_record(end + 1)
            self._last_start = None

    def _read_from(self, start: int) -> Generator[WarcPage | BadRecord, None, bool]:
        """Yield the records from a byte on; True if more may follow the last one, whose body has confused FastWARC."""
        stream = _View(self._data, start)
        types = self._warc.WarcRecordType
        for record in self._warc.ArchiveIterator(stream, parse_http=True, auto_decode="none"):
            if self._held is not None:
                yield self._held
            self._held, self._last_start = None, start + record.stream_pos
            if self._last_start >= self._end:
                return False
            if record.record_type in (types.response, types.conversion, types.resource):
                self._held = self._read_page(record, self._last_start)
                if isinstance(self._held, BadRecord):
                    return True
        return False

    def _read_page(self, record: Any, position: int) -> WarcPage | BadRecord:
        headers = record.http_headers
        kind = record.http_content_type if headers is not None else record.headers.get("Content-Type", "text/plain")
        kind = kind or record.headers.get("WARC-Identified-Payload-Type") or ""
        page = WarcPage(
            position,
            record.headers.get("WARC-Target-URI"),
            record.headers.get("WARC-Date"),
            None if headers is None else headers.status_code,
            kind.partition(";")[0].strip().lower(),
            record.http_charset if headers is not None else "utf-8",
            b"",
        )
        if not page.is_document and page.content_type:  # nobody needs a film in memory
            return page
        try:
            body = record.reader.read()
            page = replace(page, body=decode_body(body, dict(headers.astuples())) if headers is not None else body)
        except (OSError, ValueError) as error:
            return BadRecord(position, f"its body cannot be decoded: {error}", b"")
        is_html = not page.content_type and page.body.lstrip()[:15].lower().startswith(_HTML_BEGINNINGS)
        return replace(page, content_type=_HTML_TYPES[0]) if is_html else page

    def _find_end(self, start: int) -> int | None:
        """Behind the record that begins at `start`; None where the file ends before the record does."""
        if not self._is_gzip:
            return find_record_end(self._data, start)
        decompressor = zlib.decompressobj(16 + zlib.MAX_WBITS)
        position = start
        while not decompressor.eof and position < len(self._data):
            decompressor.decompress(self._data[position : position + _CHUNK_BYTES])
            position += _CHUNK_BYTES
        return min(position, len(self._data)) - len(decompressor.unused_data) if decompressor.eof else None

    def find_borders(self, limit: int) -> list[int]:
        """Do what the function of this name does."""
        borders = [0]
        position: int | None = 0
        while position is not None and borders[-1] + limit * 3 // 2 < len(self._data):
            wanted = borders[-1] + limit
            position = self._find_record(wanted) if self._is_gzip else self._walk(position, wanted)
            if position is not None:
                borders.append(position)
        return [*borders, len(self._data)]

    def _walk(self, position: int | None, wanted: int) -> int | None:
        """Return the first record that begins at `wanted` or later; not one in the body of another."""
        while position is not None and position < wanted:
            is_record = self._data[position : position + len(RECORD_MAGIC)] == RECORD_MAGIC
            end = find_record_end(self._data, position) if is_record else None
            position = self._find_record(position + 1) if end is None else end
        return position if position is not None and position < len(self._data) else None

    def _find_record(self, start: int) -> int | None:
        """Return the next place from which a record can be read."""
        position = self._data.find(self._magic, start)
        while position >= 0:
            try:
                record = next(iter(self._warc.ArchiveIterator(_View(self._data, position), parse_http=False)))
            except (OSError, StopIteration):
                record = None
            if record is not None and record.stream_pos == 0:  # not one after it, found by skipping rubbish
                return position
            position = self._data.find(self._magic, position + 1)
        return None


class _View(io.RawIOBase):
    """A map of a file as a stream that begins at a byte of it, without a copy."""

    def __init__(self, data: mmap.mmap | bytes, start: int) -> None:
        self._data = data
        self._start = self._position = start

    def readable(self) -> bool:
        """Always."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes."""
        end = len(self._data) if size < 0 else min(len(self._data), self._position + size)
        chunk = self._data[self._position : end]
        self._position = end
        return chunk

    def tell(self) -> int:
        """Return the number of bytes since the beginning of the stream."""
        return self._position - self._start
