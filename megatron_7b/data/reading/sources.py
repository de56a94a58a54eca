"""Which files a run reads, and their bytes in blocks that begin and end where records do.

A block is about `block_bytes` of text whatever the file's size, so memory does not grow with the corpus; only a single
record that is larger makes a larger block. Reading can begin at any block's end, so that a killed run can be continued,
and where blocks begin does not depend on it.
"""

import glob
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from megatron_7b.data._index import count_lines
from megatron_7b.data.reading.blocks import Block, BlockKind, Cursor, TextDocuments
from megatron_7b.data.reading.windows import FileWindow, StreamWindow, Window, open_stream
from megatron_7b.errors import DataFormatError, MegatronError, PathError

_COMPRESSIONS = (".gz", ".zst")
_JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
_SUFFIXES = (*_JSON_SUFFIXES, ".txt", ".parquet")
_BOM = b"\xef\xbb\xbf"
_FOREIGN = {
    b"\x1f\x8b": ("gzip-compressed, but its name does not end in .gz", "rename it"),
    b"\x28\xb5\x2f\xfd": ("zstd-compressed, but its name does not end in .zst", "rename it"),
    b"PAR1": ("a parquet file, but its name does not end in .parquet", "rename it"),
    b"BZh": ("bzip2-compressed, which is not read", "decompress it, or compress it with zstd instead"),
    b"\xfd7zXZ\x00": ("xz-compressed, which is not read", "decompress it, or compress it with zstd instead"),
    b"PK\x03\x04": ("a zip archive, which is not read", "unpack it"),
    b"\xff\xfe": ("UTF-16, expected UTF-8", "`iconv -f UTF-16 -t UTF-8` converts it"),
    b"\xfe\xff": ("UTF-16, expected UTF-8", "`iconv -f UTF-16 -t UTF-8` converts it"),
}
"""What a file is by its first bytes, and what to do then: none of it can begin a JSON line or UTF-8 text."""
_HEAD_BYTES = 4096


@dataclass(frozen=True)
class SourceRecord:
    """What the manifest says of a source that was read to its end."""

    path: str
    size: int
    """Of the whole file, in bytes."""
    xxh3_128: str | None
    """Of the bytes that were read, as they are on disk; None if they were not read in one stream (parquet)."""
    span: tuple[int, int] | None = None
    """The bytes that were read; None for all."""


class Source:
    """One input file, or a shard's part of it, and how far it has been read."""

    def __init__(self, path: Path, span: tuple[int, int] | None = None) -> None:
        """Look at a file.

        Args:
            path: The file.
            span: Only the records that begin in these bytes [begin, end); of parquet, the row groups whose middle is
                there.
        """
        self.path = path
        status = path.stat()
        self.size = status.st_size
        self.modified_ns = status.st_mtime_ns
        self.span = span
        self.bytes_read = 0
        self._hash = xxhash.xxh3_128()
        self._digest: str | None = None
        self._read_span = span

    @property
    def share(self) -> int:
        """Bytes that are to be read of it, for progress."""
        return self.size if self.span is None else self.span[1] - self.span[0]

    @property
    def format(self) -> str:
        """Its ending without the compression: `.jsonl`, `.txt`, `.parquet`; whatever is unknown is JSONL."""
        suffix = _get_suffix(self.path)
        return suffix if suffix in _SUFFIXES else ".jsonl"

    @property
    def compression(self) -> str:
        """`.gz`, `.zst` or nothing."""
        return _get_compression(self.path)

    def can_be_cut(self, text_documents: TextDocuments) -> bool:
        """Return whether it can be read from any byte on: borders of records can be found there."""
        return not self.compression and (self.format in _JSON_SUFFIXES or self._kind(text_documents) == "line")

    def read_blocks(
        self, keys: Sequence[str], text_documents: TextDocuments, block_bytes: int, start: Cursor | None = None
    ) -> Iterator[Block]:
        """Yield its records in order.

        Args:
            keys: Of the texts, for parquet's columns.
            text_documents: What one document of plain text is.
            block_bytes: Size to aim at.
            start: The end of a block, to continue after it; what comes before is read once more, for the hash.

        Raises:
            DataFormatError: The file is damaged as a whole (cut compression, not parquet, a missing column).
        """
        if self.format == ".parquet":
            from megatron_7b.data.reading.parquet import read_row_blocks

            for share, block in read_row_blocks(self.path, self.span, keys, block_bytes, start or Cursor()):
                self.bytes_read = int(self.size * share)
                yield block
            return
        kind = self._kind(text_documents)
        try:
            with self.path.open("rb", buffering=0) as file:
                if self.compression:
                    with open_stream(file, self.compression, self._note) as stream:
                        yield from self._cut(StreamWindow(stream), kind, block_bytes, start)
                else:
                    yield from self._cut(FileWindow(file, self.size, self.span, self._note), kind, block_bytes, start)
        except (EOFError, OSError, ValueError) as error:
            raise DataFormatError(f"{self.path} cannot be read: {error}") from error
        except Exception as error:
            if type(error).__name__ not in ("ZstdError", "IsalError"):
                raise
            raise DataFormatError(f"{self.path} is damaged or not a whole {self.compression} file: {error}") from error

    def has_changed(self) -> bool:
        """Return whether the file is another one now than when this was made."""
        try:
            status = self.path.stat()
        except OSError:
            return True
        return (status.st_size, status.st_mtime_ns) != (self.size, self.modified_ns)

    def restore(self, record: "SourceRecord") -> None:
        """Count as read to the end, by what was noted then."""
        self._digest, self._read_span = record.xxh3_128, record.span
        self.bytes_read = self.share

    def to_record(self) -> SourceRecord:
        """Return its facts for the manifest, to be called at the end."""
        digest = self._digest or (None if self.format == ".parquet" else self._hash.hexdigest())
        return SourceRecord(str(self.path), self.size, digest, self._read_span)

    def _kind(self, text_documents: TextDocuments) -> BlockKind:
        return text_documents if self.format == ".txt" else "jsonl"

    def _note(self, data: memoryview) -> None:
        self.bytes_read += len(data)
        self._hash.update(data)

    def _cut(self, window: Window, kind: BlockKind, block_bytes: int, start: Cursor | None) -> Iterator[Block]:
        """Cut the window's bytes after the last end of a record in each `block_bytes`."""
        label = self.path
        if self.span is not None:
            self._read_span = (window.begin, window.end)
            if window.begin:  # the numbers of its lines are not known
                label = Path(f"{self.path}[from byte {window.begin}]")
        offset, record = start or Cursor(window.begin)
        window.skip_to(offset)
        if kind == "file":
            block_bytes = max(block_bytes, self.size + 1)
        size = block_bytes
        while chunk := window.read(offset, size):
            # What is shorter than asked for is the end, whatever it ends with.
            cut = len(chunk) if len(chunk) < size else _find_last_end(chunk, kind)
            if cut == 0:  # one record longer than a block
                size *= 2
                continue
            data = memoryview(chunk)[:cut]
            offset, size = offset + cut, block_bytes
            first, record = record, record + count_lines(data)
            if offset == cut:
                check_head(self.path, self.format, bytes(data[:_HEAD_BYTES]))
                if kind != "file" and data[:3] == _BOM:
                    data = data[3:]
            yield Block(kind, label, first, data, end=Cursor(offset, record))


def find_sources(patterns: Sequence[str]) -> list[Source]:
    """Return the sources of files, globs and folders, in the order given; those of a folder or glob by name.

    Raises:
        PathError: Something is not there, not readable, named twice, or matches no file; all of it in one message.
        DataFormatError: A file is not what it is named, whatever else is wrong.
    """
    paths: list[Path] = []
    problems: list[str] = []
    for pattern in patterns:
        found = _find_paths(pattern)
        paths += found
        if not found:
            problems.append(_explain_nothing(pattern))
    sources: dict[Path, Source] = {}
    kind: type[MegatronError] = PathError
    for path in paths:
        try:
            source = _open_source(path)
        except OSError as error:
            problems.append(f"input {path} cannot be read: {error.strerror}")
        except (DataFormatError, PathError) as error:
            problems.append(f"input {error.args[0]}" + (f" ({error.hint})" if error.hint else ""))
            kind = DataFormatError if isinstance(error, DataFormatError) else kind
        else:
            if sources.setdefault(path.resolve(), source) is not source:
                problems.append(f"input {path} is named twice (a blend reads a corpus more often, by its weight)")
    if problems:
        raise kind("\n".join(problems))
    return list(sources.values())


def _open_source(path: Path) -> Source:
    if not stat.S_ISREG(path.stat().st_mode):
        raise PathError(f"{path} is not a regular file", hint="write what comes through a pipe to a file first")
    source = Source(path)
    with path.open("rb") as file:
        if not source.compression:
            check_head(path, source.format, file.read(_HEAD_BYTES))
    return source


def check_head(path: Path, suffix: str, head: bytes) -> None:
    """Refuse a file that is not text, or no record of which is on one line: every line of it would be a bad record.

    Args:
        path: As messages name it.
        suffix: What its name says it is, see `Source.format`.
        head: Its first bytes, decompressed.

    Raises:
        DataFormatError: That is so.
    """
    if suffix == ".parquet":
        return
    for magic, (what, hint) in _FOREIGN.items():
        if head.startswith(magic):
            raise DataFormatError(f"{path} is {what}", hint=hint)
    first_line = head.removeprefix(_BOM).lstrip().split(b"\n", 1)[0].strip()
    if suffix in _JSON_SUFFIXES and (first_line in (b"[", b"{") or first_line.startswith(b"[{")):
        what, query = ("an array of objects", ".[]") if first_line[:1] == b"[" else ("an object on several lines", ".")
        raise DataFormatError(
            f"{path} begins with {what}, expected one JSON object per line", hint=f"`jq -c '{query}'` writes that"
        )


def _find_paths(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_dir():
        return sorted(file for file in walk_folder(path) if _get_suffix(file) in _SUFFIXES and not _is_manifest(file))
    if path.exists():
        return [path]
    found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207  # absolute patterns too
    return [file for file in found if file.is_file() and not _is_manifest(file)]


def walk_folder(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder, through links too, each folder once, without names that begin with a dot."""
    seen = set()
    for name, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(one for one in folders if not one.startswith("."))
        if (real := os.path.realpath(name)) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (file for one in files if not one.startswith(".") and (file := Path(name, one)).is_file())


def _is_manifest(file: Path) -> bool:
    """Return whether a corpus that was written beside its texts has this name; see `corpus_manifest`."""
    return file.suffix == ".json" and file.with_suffix(".idx").exists()


def _get_compression(path: Path) -> str:
    suffix = path.suffix.lower()
    return suffix if suffix in _COMPRESSIONS else ""


def _get_suffix(path: Path) -> str:
    """Return the ending before the compression's."""
    return (path.with_suffix("") if _get_compression(path) else path).suffix.lower()


def _explain_nothing(pattern: str) -> str:
    if pattern == "-":
        return "input - : standard input cannot be read again after a kill, so only files are (write it to one first)"
    if Path(pattern).is_dir():
        return f"input folder {pattern} has no file ending in {', '.join(_SUFFIXES)} (or these with .gz, .zst)"
    if glob.has_magic(pattern):
        return f"input {pattern} matches no file"
    return f"input {pattern} does not exist"


def _find_last_end(chunk: bytes, kind: BlockKind) -> int:
    """Return where the last whole record ends; 0 if none does."""
    if kind == "file":
        return 0
    if kind != "paragraph":
        return chunk.rfind(b"\n") + 1
    blank = max(chunk.rfind(b"\n\n"), chunk.rfind(b"\n\r\n") + 1)
    return blank + 2 if blank > 0 else 0
