"""WARC files (ISO 28500): web pages with their headers, read with FastWARC.

FastWARC ends without a word where a file is cut off, and gives up at the first damaged record. Here a damaged record is
handed on as such and reading goes on behind it, and a file that does not end as it should ends in such a record too.
"""

import io
import mmap
import re
import zlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_7b.prepare.extras import import_extra

_GZIP_MAGIC = b"\x1f\x8b\x08"
_RECORD_MAGIC = b"WARC/1."
_RECORD_END = b"\r\n\r\n"
_HTML_TYPES = ("text/html", "application/xhtml+xml")
_CONTENT_LENGTH = re.compile(rb"\r\nContent-Length:[ \t]*(\d+)", re.IGNORECASE)
_CHUNK_BYTES = 1 << 20
_HEAD_BYTES = 200


@dataclass(frozen=True, slots=True)
class WarcPage:
    """A page, or a text that somebody extracted from one (WET)."""

    position: int
    """Number among the responses and conversions of the file, from 1; unreadable ones count."""
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


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that cannot be read."""

    position: int
    reason: str
    head: bytes


def read_warc(path: Path) -> Iterator[WarcPage | BadRecord]:
    """Responses and conversions of a .warc or .warc.gz file, in order.

    Raises:
        ConfigError: FastWARC is not installed.
    """
    if path.stat().st_size == 0:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield from _Reader(data).read()


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._is_gzip = data[: len(_GZIP_MAGIC)] == _GZIP_MAGIC
        self._magic = _GZIP_MAGIC if self._is_gzip else _RECORD_MAGIC
        self._warc = import_extra("fastwarc.warc", "reading WARC files")
        self._position = 0
        self._last_start: int | None = None
        """Where the last record began whose headers could be read."""
        self._held: WarcPage | BadRecord | None = None
        """Of the last record: whether it is whole is only known when the next one begins."""

    def read(self) -> Iterator[WarcPage | BadRecord]:
        start: int | None = 0
        while start is not None:
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
            rest = b"" if end is None else self._data[end : end + _HEAD_BYTES]
            start = end if goes_on and rest else None
            if start is None and rest.strip(b"\r\n\0"):
                assert end is not None
                self._position += 1
                yield BadRecord(self._position, f"no WARC record at byte {end}: {error or 'the file is cut off'}", rest)
                start = self._find_record(end + 1)
            self._last_start = None

    def _read_from(self, start: int) -> Generator[WarcPage | BadRecord, None, bool]:
        """The records from a byte on; True if they may go on behind the last one, whose body has confused FastWARC."""
        stream = _View(self._data, start)
        types = self._warc.WarcRecordType
        for record in self._warc.ArchiveIterator(stream, parse_http=True, auto_decode="all"):
            if self._held is not None:
                yield self._held
            self._held, self._last_start = None, start + record.stream_pos
            if record.record_type in (types.response, types.conversion):
                self._position += 1
                self._held = self._read_page(record)
                if isinstance(self._held, BadRecord):
                    return True
        return False

    def _read_page(self, record: Any) -> WarcPage | BadRecord:
        try:
            body = record.reader.read()
        except (OSError, ValueError) as error:
            return BadRecord(self._position, f"its body cannot be decoded: {error}", b"")
        headers = record.http_headers
        kind = record.http_content_type if headers is not None else record.headers.get("Content-Type", "text/plain")
        return WarcPage(
            self._position,
            record.headers.get("WARC-Target-URI"),
            record.headers.get("WARC-Date"),
            None if headers is None else headers.status_code,
            (kind or "").partition(";")[0].strip().lower(),
            record.http_charset if headers is not None else "utf-8",
            body,
        )

    def _find_end(self, start: int) -> int | None:
        """Behind the record that begins at `start`; None where the file ends before the record does."""
        if not self._is_gzip:
            header_end = self._data.find(_RECORD_END, start)
            length = _CONTENT_LENGTH.search(self._data[start:header_end]) if header_end >= 0 else None
            end = header_end + len(_RECORD_END) + int(length.group(1)) if length else len(self._data) + 1
            return self._skip_line_ends(end) if end <= len(self._data) else None
        decompressor = zlib.decompressobj(16 + zlib.MAX_WBITS)
        position = start
        while not decompressor.eof and position < len(self._data):
            decompressor.decompress(self._data[position : position + _CHUNK_BYTES])
            position += _CHUNK_BYTES
        return min(position, len(self._data)) - len(decompressor.unused_data) if decompressor.eof else None

    def _skip_line_ends(self, position: int) -> int:
        return position + len(_RECORD_END) if self._data[position : position + 4] == _RECORD_END else position

    def _find_record(self, start: int) -> int | None:
        """The next place from which a record can be read."""
        position = self._data.find(self._magic, start)
        while position >= 0:
            try:
                next(iter(self._warc.ArchiveIterator(_View(self._data, position), parse_http=False)))
            except (OSError, StopIteration):
                position = self._data.find(self._magic, position + 1)
            else:
                return position
        return None


class _View(io.RawIOBase):
    """A map of a file as a stream that begins at a byte of it, without a copy."""

    def __init__(self, data: mmap.mmap, start: int) -> None:
        self._data = data
        self._start = self._position = start

    def readable(self) -> bool:
        """Always."""
        return True

    def read(self, size: int = -1) -> bytes:
        """The next bytes."""
        end = len(self._data) if size < 0 else min(len(self._data), self._position + size)
        chunk = self._data[self._position : end]
        self._position = end
        return chunk

    def tell(self) -> int:
        """Bytes since the beginning of the stream."""
        return self._position - self._start
