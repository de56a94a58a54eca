"""Which files a run reads, and the pieces of work they are cut into."""

import glob
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from megatron_7b.data.reading.sources import walk_folder
from megatron_7b.errors import ConfigError, PathError
from megatron_7b.prepare.recipe import Recipe, RecipeBook

type Format = Literal["jsonl", "txt", "parquet", "html", "warc"]

_COMPRESSIONS = (".gz", ".zst")
_FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "txt",
    ".parquet": "parquet",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
    ".warc": "warc",
    ".wet": "warc",
}
_COUNT_BYTES = 1 << 24


@dataclass(frozen=True)
class InputFile:
    """One file that a run reads."""

    path: str
    """As the user named it, or as a folder or pattern of theirs gave it."""
    format: Format
    compression: str
    """`.gz`, `.zst` or nothing."""
    size: int
    modified_ns: int


@dataclass(frozen=True)
class Piece:
    """A file, or a range of a large one that begins and ends between records."""

    file: InputFile
    start: int = 0
    """Byte (JSONL, lines of text, WARC) or row group (parquet)."""
    end: int | None = None
    """End of the last byte or row group (exclusive); None for the end of the file."""
    first_record: int = 1
    """Number of its first line or row in the file; of an unpacked WARC file, the byte at which it begins."""
    size: int = 0
    """Bytes, about."""
    rows: tuple[int, int] | None = None
    """Within the row group, where that is too large for one piece."""
    part: str = ""
    """File with this piece alone, in the folder of what was unpacked."""


@dataclass(frozen=True)
class Shard:
    """Work for one worker: pieces that follow one another and have the same recipe."""

    number: int
    pieces: tuple[Piece, ...]
    recipe: Recipe

    @property
    def size(self) -> int:
        """Bytes of its input, about."""
        return sum(piece.size for piece in self.pieces)

    @property
    def label(self) -> str:
        """For messages: its number and files."""
        first, last = self.pieces[0].file.path, self.pieces[-1].file.path
        return f"shard {self.number} ({first}{'' if first == last else f' to {last}'})"


@dataclass(frozen=True)
class Inputs:
    """Return the files that the patterns of a user match."""

    files: list[InputFile]
    left_out: Counter[str]
    """Files in their folders whose ending is of no known format, by ending."""


def find_inputs(patterns: Sequence[str]) -> Inputs:
    """Return files, globs and folders, in the order given; those of a folder or glob sorted by name.

    Raises:
        PathError: Something is not there, not readable, of no known format, or named twice; all in one message.
    """
    problems: list[str] = []
    left_out: Counter[str] = Counter()
    files: list[InputFile] = []
    seen: set[Path] = set()
    for pattern in patterns:
        paths = _find_paths(pattern, left_out)
        if not paths:
            problems.append(_explain_nothing(pattern))
        for path in paths:
            try:
                files.append(_describe(path))
                if path.resolve() in seen:
                    problems.append(f"input {path} is named twice")
                seen.add(path.resolve())
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) else error
                problems.append(f"input {path} cannot be read: {reason}")
    if problems:
        raise PathError("\n".join(problems), hint=f"known endings: {_known_endings()}")
    return Inputs(files, left_out)


def plan_shards(
    files: Sequence[InputFile], book: RecipeBook, unpacked: Mapping[str, Sequence[Piece]] | None = None
) -> list[Shard]:
    """Cut large files and gather small ones into shards of about `reading.shard_megabytes`, in input order.

    Large JSONL, text, parquet and WARC files are cut between records; compressed ones that cannot be read from the
    middle have been unpacked into pieces before. Text files that are one document, and html files, stay whole.

    Args:
        files: The inputs.
        book: What is wanted of each.
        unpacked: Pieces of the files that were unpacked, by path.

    Raises:
        DataFormatError: A parquet file is damaged.
    """
    unpacked = unpacked or {}
    shards: list[Shard] = []
    gathered: list[Piece] = []
    recipe = book.recipe
    for file in files:
        _, wanted = book.find_entry(file.path)
        limit = int(wanted.reading.shard_megabytes * 1_000_000)
        for piece in unpacked[file.path] if file.path in unpacked else _cut(file, wanted, limit):
            if gathered and (wanted != recipe or sum(one.size for one in gathered) + piece.size > limit):
                shards.append(Shard(len(shards), tuple(gathered), recipe))
                gathered = []
            gathered.append(piece)
            recipe = wanted
    if gathered:
        shards.append(Shard(len(shards), tuple(gathered), recipe))
    return shards


def check_per_source(files: Sequence[InputFile], book: RecipeBook) -> None:
    """Refuse what was meant for files that are not there.

    Raises:
        ConfigError: An entry of `per_source` matches no file.
    """
    used = {book.find_entry(file.path)[0] for file in files}
    for index, (entry, _) in enumerate(book.per_source):
        if index not in used:
            raise ConfigError(
                f"per_source: no input is matched by {' '.join(entry)}, or later entries match all that are",
                hint=f"patterns are compared with whole paths, such as {files[0].path}",
            )


def _find_paths(pattern: str, left_out: Counter[str]) -> list[Path]:
    path = Path(pattern)
    if path.is_dir():
        found = sorted(walk_folder(path))
        left_out.update(file.suffix or "no ending" for file in found if _format_of(file) is None)
        return [file for file in found if _format_of(file) is not None]
    if path.exists():
        return [path]
    return [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if Path(name).is_file()]  # noqa: PTH207  # absolute patterns too


def _format_of(path: Path) -> Format | None:
    known = _FORMATS.get((path.with_suffix("") if _compression_of(path) else path).suffix.lower())
    return None if _compression_of(path) and known in ("html", "parquet") else known


def _compression_of(path: Path) -> str:
    suffix = path.suffix.lower()
    return suffix if suffix in _COMPRESSIONS else ""


def _describe(path: Path) -> InputFile:
    if not path.is_file():
        raise ValueError("it is no regular file")  # a pipe can be read once, and is waited for when it is opened
    with path.open("rb"):
        facts = path.stat()
    known = _format_of(path)
    if known is None:
        raise ValueError("its ending says no known format")
    return InputFile(str(path), known, _compression_of(path), facts.st_size, facts.st_mtime_ns)


def _explain_nothing(pattern: str) -> str:
    if Path(pattern).is_dir():
        return f"input folder {pattern} has no file of a known format"
    return f"input {pattern} {'matches no file' if glob.has_magic(pattern) else 'does not exist'}"


def _known_endings() -> str:
    return f"{', '.join(_FORMATS)}; all but html and parquet also with .gz or .zst"


def _cut(file: InputFile, recipe: Recipe, limit: int) -> Iterator[Piece]:
    by_line = file.format == "jsonl" or (file.format == "txt" and recipe.reading.text_documents == "line")
    if file.size <= limit * 3 // 2:
        yield Piece(file, size=file.size)
    elif file.format == "parquet":
        yield from _cut_parquet(file, limit)
    elif by_line and not file.compression:
        yield from _cut_lines(file, limit)
    elif file.format == "warc":
        yield from _cut_archive(file, limit)
    else:
        yield Piece(file, size=file.size)


def _cut_lines(file: InputFile, limit: int) -> Iterator[Piece]:
    """Yield pieces of whole lines, found while counting them."""
    start = position = 0
    first = lines = 1
    with Path(file.path).open("rb") as stream:
        while chunk := stream.read(_COUNT_BYTES):
            cut = chunk.find(b"\n", max(0, start + limit - position)) if position + len(chunk) >= start + limit else -1
            while cut >= 0:
                end = position + cut + 1
                lines_before = lines + chunk.count(b"\n", 0, cut + 1)
                yield Piece(file, start, end, first, end - start)
                start, first = end, lines_before
                cut = chunk.find(b"\n", start + limit - position) if start + limit - position < len(chunk) else -1
            lines += chunk.count(b"\n")
            position += len(chunk)
    if start < position:
        yield Piece(file, start, position, first, position - start)


def _cut_parquet(file: InputFile, limit: int) -> Iterator[Piece]:
    from megatron_7b.prepare.reading.parquet_rows import read_group_sizes

    groups = read_group_sizes(file.path)
    start = row = size = 0
    first = 1
    for group, (rows, num_bytes) in enumerate(groups):
        if size and size + num_bytes > limit:
            yield Piece(file, start, group, first, size)
            start, first, size = group, row + 1, 0
        if num_bytes > limit * 3 // 2:
            for begin, end in pairwise(_spread(rows, min(rows, num_bytes // limit))):
                yield Piece(file, group, group + 1, row + begin + 1, num_bytes * (end - begin) // rows, (begin, end))
            start, first = group + 1, row + rows + 1
        else:
            size += num_bytes
        row += rows
    if start < len(groups):
        yield Piece(file, start, len(groups), first, size)


def _spread(rows: int, count: int) -> list[int]:
    """[count + 1] borders of as good as equal parts."""
    return [rows * number // count for number in range(count + 1)]


def _cut_archive(file: InputFile, limit: int) -> Iterator[Piece]:
    """Yield pieces of whole records."""
    from megatron_7b.prepare.reading.warc import find_borders

    for start, end in pairwise(find_borders(Path(file.path), limit)):
        yield Piece(file, start, end, size=end - start)
