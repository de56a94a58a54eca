"""Bytes of a source by offset: of a plain file from any place, of a compressed one forwards; shown to a hash."""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, Protocol, cast

_SKIP_BYTES = 1 << 20

type Observe = Callable[[memoryview], None]
"""Is shown every byte on disk, once and in order."""


class Window(Protocol):
    """What cutting into blocks needs of a source."""

    @property
    def begin(self) -> int:
        """The first byte of the first record."""

    @property
    def end(self) -> int:
        """Behind the last byte of the last record, where that is known beforehand; else 0."""

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on, fewer only at the end. Offsets never decrease."""

    def skip_to(self, offset: int) -> None:
        """Make `offset` the next one."""


class FileWindow:
    """A plain file, or those of its lines that begin in a span of its bytes."""

    def __init__(self, file: io.FileIO, size: int, span: tuple[int, int] | None, observe: Observe) -> None:
        self._file = file
        self._observe = observe
        self.begin, self.end = 0, size
        if span is not None:
            self.begin, self.end = (self._find_line(at, size) for at in span)
        self._observed = self.begin

    def read(self, offset: int, size: int) -> bytes:
        """Read at a place, whatever was read before."""
        wanted = min(size, self.end - offset)
        chunk = os.pread(self._file.fileno(), wanted, offset)
        while len(chunk) < wanted:
            more = os.pread(self._file.fileno(), wanted - len(chunk), offset + len(chunk))
            if not more:
                raise EOFError(f"it became shorter while it was read: {offset + len(chunk)} bytes of {self.end}")
            chunk += more
        if offset + len(chunk) > self._observed:
            self._observe(memoryview(chunk)[self._observed - offset :])
            self._observed = offset + len(chunk)
        return chunk

    def skip_to(self, offset: int) -> None:
        """Read what comes before, for the observer."""
        while self._observed < offset:
            self.read(self._observed, min(_SKIP_BYTES, offset - self._observed))

    def _find_line(self, at: int, size: int) -> int:
        """Return where the first line begins that begins at `at` or later."""
        if at == 0:
            return 0
        at -= 1
        while at < size and (chunk := os.pread(self._file.fileno(), 1 << 16, at)):
            if (end := chunk.find(b"\n")) >= 0:
                return at + end + 1
            at += len(chunk)
        return size


class StreamWindow:
    """A stream that can only be read forwards."""

    begin = end = 0

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._held = b""
        self._offset = 0

    def read(self, offset: int, size: int) -> bytes:
        """Read on, keeping what comes after `offset`."""
        pieces = [self._held[offset - self._offset :]]
        missing = size - len(pieces[0])
        while missing > 0 and (more := self._stream.read(missing)):
            pieces.append(more)
            missing -= len(more)
        self._held, self._offset = b"".join(pieces), offset
        return self._held if missing >= 0 else self._held[:size]

    def skip_to(self, offset: int) -> None:
        """Decompress what comes before."""
        while self._offset < offset:
            step = min(_SKIP_BYTES, offset - self._offset)
            if len(self._stream.read(step)) < step:
                raise EOFError(f"it became shorter: no byte {offset}")
            self._offset += step


@contextmanager
def open_stream(file: io.FileIO, compression: str, observe: Observe) -> Iterator[IO[bytes]]:
    """Yield the decompressed bytes of a file.

    Args:
        file: As it is on disk.
        compression: `.gz` or `.zst`.
        observe: Is shown the compressed bytes, to the end of the file.
    """
    raw = _Tap(file, observe)
    with _decompress(raw, compression) as stream:
        yield stream
    while raw.read(_SKIP_BYTES):  # what a decompressor left unread belongs to the hash
        pass


class _Tap(io.RawIOBase):
    """A raw file that shows every byte read from it to an observer, however it is decompressed above."""

    def __init__(self, file: io.FileIO, observe: Observe) -> None:
        self._file = file
        self._observe = observe

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read up to len(buffer) bytes."""
        view = memoryview(buffer).cast("B")
        count = self._file.readinto(view) or 0
        self._observe(view[:count])
        return count


@contextmanager
def _decompress(raw: _Tap, compression: str) -> Iterator[IO[bytes]]:
    if compression == ".gz":
        from isal import igzip

        with igzip.IGzipFile(fileobj=raw, mode="rb") as stream:  # type: ignore[no-untyped-call,unused-ignore]
            yield cast(IO[bytes], stream)
    else:
        with _open_zstd(raw) as stream:
            yield stream


def _open_zstd(raw: _Tap) -> Any:
    try:
        from compression import zstd  # type: ignore[import-not-found,unused-ignore]  # from Python 3.14 on
    except ImportError:
        from backports import zstd
    # What `zstd --long=31` has written too; the memory is taken only where a file asks for it.
    return zstd.ZstdFile(raw, mode="rb", options={zstd.DecompressionParameter.window_log_max: 31})
