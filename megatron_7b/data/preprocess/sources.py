"""Which files a run reads, and their bytes in blocks that end where records end.

A block is about `block_bytes` of text whatever the file's size, so memory does not grow with the corpus; only a single
record that is larger makes a larger block.
"""

import glob
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

import xxhash

from megatron_7b.errors import DataFormatError

type TextDocuments = Literal["file", "paragraph", "line"]
type BlockKind = Literal["jsonl", "file", "paragraph", "line", "rows"]

_COMPRESSIONS = (".gz", ".zst")
_JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
_SUFFIXES = (*_JSON_SUFFIXES, ".txt", ".parquet")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive records of one source."""

    kind: BlockKind
    source: Path
    first_record: int
    """Number of the first record, from 1: a line of JSONL or text, a row of parquet."""
    data: bytes
    """Raw text; empty for rows."""
    rows: Any = None
    """A pyarrow RecordBatch for kind `rows`."""


@dataclass(frozen=True)
class SourceRecord:
    """What the manifest says of a source that was read to its end."""

    path: str
    size: int
    xxh3_128: str | None
    """Of the file as it lies on disk; None where it was not read in one stream (parquet)."""


class Source:
    """One input file and how far it has been read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size
        self.bytes_read = 0
        self._hash = xxhash.xxh3_128()

    @property
    def format(self) -> str:
        """Its ending without the compression: `.jsonl`, `.txt`, `.parquet`; whatever is unknown is JSONL."""
        name = self.path.with_suffix("") if self.compression else self.path
        return name.suffix if name.suffix in _SUFFIXES else ".jsonl"

    @property
    def compression(self) -> str:
        """`.gz`, `.zst` or nothing."""
        return self.path.suffix if self.path.suffix in _COMPRESSIONS else ""

    def read_blocks(self, keys: Sequence[str], text_documents: TextDocuments, block_bytes: int) -> Iterator[Block]:
        """Its records in order.

        Raises:
            DataFormatError: The file is damaged as a whole (cut compression, not parquet, a missing column).
        """
        if self.format == ".parquet":
            from megatron_7b.data.preprocess.parquet import read_row_blocks

            yield from read_row_blocks(self, keys, block_bytes)
            return
        kind: BlockKind = text_documents if self.format == ".txt" else "jsonl"
        with self._open() as stream:
            if kind == "file":
                yield Block(kind, self.path, 1, stream.read())
            else:
                yield from _cut_blocks(stream, kind, self.path, block_bytes)

    def to_record(self) -> SourceRecord:
        """Its facts for the manifest, to be called at the end."""
        digest = None if self.format == ".parquet" else self._hash.hexdigest()
        return SourceRecord(str(self.path), self.size, digest)

    @contextmanager
    def _open(self) -> Iterator[IO[bytes]]:
        try:
            with self.path.open("rb", buffering=0) as file:
                raw = _Tap(file, self._note)
                with _decompress(raw, self.compression) as stream:
                    yield stream
                while raw.read(1 << 20):  # what a decompressor left unread belongs to the hash
                    pass
        except (EOFError, OSError, ValueError) as error:
            raise DataFormatError(f"{self.path} cannot be read: {error}") from error
        except Exception as error:
            if type(error).__name__ not in ("ZstdError", "IsalError"):
                raise
            raise DataFormatError(f"{self.path} is damaged or not a whole {self.compression} file: {error}") from error

    def _note(self, data: memoryview) -> None:
        self.bytes_read += len(data)
        self._hash.update(data)


class _Tap(io.RawIOBase):
    """A raw file that shows every byte read from it to an observer, however it is decompressed above."""

    def __init__(self, file: io.RawIOBase | io.FileIO, observe: Callable[[memoryview], None]) -> None:
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


def find_sources(patterns: Sequence[str]) -> list[Source]:
    """Files, globs and folders to sources, in the order given; a folder's and a glob's files sorted by name.

    Raises:
        DataFormatError: Something is not there, not readable, or matches no file; all of it in one message.
    """
    paths: list[Path] = []
    problems: list[str] = []
    for pattern in patterns:
        found = _find_paths(pattern)
        paths += found
        if not found:
            problems.append(_explain_nothing(pattern))
    sources = []
    for path in paths:
        try:
            with path.open("rb"):
                sources.append(Source(path))
        except OSError as error:
            problems.append(f"input {path} cannot be read: {error.strerror}")
    if problems:
        raise DataFormatError("\n".join(problems))
    return sources


def _find_paths(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file() and _is_known(file))
    if path.exists():
        return [path]
    return [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if Path(name).is_file()]  # noqa: PTH207  # absolute patterns too


def _is_known(file: Path) -> bool:
    name = file.with_suffix("") if file.suffix in _COMPRESSIONS else file
    return name.suffix in _SUFFIXES


def _explain_nothing(pattern: str) -> str:
    if Path(pattern).is_dir():
        return f"input folder {pattern} has no file ending in {', '.join(_SUFFIXES)} (or these with .gz, .zst)"
    if glob.has_magic(pattern):
        return f"input {pattern} matches no file"
    return f"input {pattern} does not exist"


@contextmanager
def _decompress(raw: _Tap, compression: str) -> Iterator[IO[bytes]]:
    match compression:
        case ".gz":
            from isal import igzip

            with igzip.IGzipFile(fileobj=raw, mode="rb") as stream:  # type: ignore[no-untyped-call,unused-ignore]
                yield cast(IO[bytes], stream)
        case ".zst":
            with _open_zstd(raw) as stream:
                yield stream
        case _:
            yield cast(IO[bytes], raw)


def _open_zstd(raw: _Tap) -> Any:
    try:
        from compression import zstd  # type: ignore[import-not-found,unused-ignore]  # from Python 3.14 on
    except ImportError:
        from backports import zstd
    return zstd.ZstdFile(raw, mode="rb")


def _cut_blocks(stream: IO[bytes], kind: BlockKind, path: Path, block_bytes: int) -> Iterator[Block]:
    """Cut at the last end of a record in each `block_bytes` read; carry the rest over."""
    first_record = 1
    carried: list[bytes] = []
    is_start = True
    while chunk := stream.read(block_bytes):
        if is_start:
            chunk, is_start = chunk.removeprefix(_BOM), False
        end = _find_last_end(chunk, kind)
        if end == 0:  # one record longer than a block: collected in a list, so that joining stays linear
            carried.append(chunk)
            continue
        data = b"".join([*carried, chunk[:end]])
        yield Block(kind, path, first_record, data)
        first_record += data.count(b"\n")
        carried = [chunk[end:]]
    if rest := b"".join(carried):
        yield Block(kind, path, first_record, rest)


def _find_last_end(chunk: bytes, kind: BlockKind) -> int:
    """Where the last whole record ends; 0 where none does."""
    if kind != "paragraph":
        return chunk.rfind(b"\n") + 1
    blank = max(chunk.rfind(b"\n\n"), chunk.rfind(b"\n\r\n") + 1)
    return blank + 2 if blank > 0 else 0
