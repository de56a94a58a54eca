"""Before the first phase: compressed files that cannot be read from the middle, unpacked once into parts that can.

A part holds whole records, lightly compressed. That costs disk for a while and a fraction of the time of what follows,
and the workers or machines that treat one file side by side need not know of each other.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megatron_7b.data.reading.sources import Source
from megatron_7b.errors import DataFormatError
from megatron_7b.prepare.document_sections import ReadingSection
from megatron_7b.prepare.extras import import_zstd
from megatron_7b.prepare.reading.inputs import InputFile, Piece
from megatron_7b.prepare.reading.unpacked_archives import decompress_archive
from megatron_7b.prepare.reading.warc import holds_many_records_per_member
from megatron_7b.prepare.recipe import RecipeBook
from megatron_7b.prepare.running.heartbeat import Heartbeat
from megatron_7b.prepare.running.workspace import hash_of, publish, read_lines, write_lines

UNPACKED = "unpacked"
_BLOCK_BYTES = 1 << 20
_PARTS = "parts.jsonl"
_LEVEL = 1
_EXPANSION = 4
"""Text is about this many times as large as its compressed form."""


def plan_unpacking(files: Sequence[InputFile], book: RecipeBook, work_folder: Path) -> list["UnpackTask"]:
    """Return a task for each file that is to be unpacked first."""
    readings = ((file, book.find_entry(file.path)[1].reading) for file in files)
    results = work_folder / UNPACKED
    return [UnpackTask(file, reading, results) for file, reading in readings if _needs_unpacking(file, reading)]


def _needs_unpacking(file: InputFile, reading: ReadingSection) -> bool:
    if file.format == "warc":
        path = Path(file.path)
        return file.compression == ".zst" or (file.compression == ".gz" and holds_many_records_per_member(path))
    can_be_cut = file.format == "jsonl" or (file.format == "txt" and reading.text_documents != "file")
    return can_be_cut and bool(file.compression) and file.size * _EXPANSION > reading.shard_megabytes * 1_500_000


@dataclass(frozen=True)
class UnpackTask:
    """Unpacks one file."""

    file: InputFile
    reading: ReadingSection
    results: Path
    """Folder in which the result appears, under a name made of all that it depends on."""

    @property
    def label(self) -> str:
        """For messages."""
        return f"unpacking {self.file.path}"

    @property
    def key(self) -> str:
        """Of everything that the result depends on."""
        return hash_of("unpack", self.file, self.reading.text_documents, self.reading.shard_megabytes)

    @property
    def folder(self) -> Path:
        """Where the result appears."""
        return self.results / self.key

    def run(self, heartbeat: Heartbeat) -> None:
        """Do it, unless it is done.

        Raises:
            DataFormatError: The file is cut or damaged.
        """
        if self.folder.exists():
            return
        limit = int(self.reading.shard_megabytes * 1_000_000)
        suffix = ".jsonl.zst" if self.file.format == "jsonl" else f".{self.file.format}.zst"
        with publish(self.folder) as folder:
            parts: list[tuple[str, int, int]] = []
            stream: IO[bytes] | None = None
            size = first = 0
            for position, data in self._read(min(limit, _BLOCK_BYTES)):
                heartbeat.begin("unpacking")
                if stream is None:
                    name, size, first = f"{len(parts):05d}{suffix}", 0, position
                    stream = import_zstd().ZstdFile(folder / name, "wb", level=_LEVEL)
                stream.write(data)
                size += len(data)
                if size >= limit:
                    stream.close()
                    parts.append((name, first, size))
                    stream = None
            if stream is not None:
                stream.close()
                parts.append((name, first, size))
            if not parts:
                raise DataFormatError(f"{self.file.path} holds nothing")
            write_lines(folder / _PARTS, parts)

    def pieces(self) -> list[Piece]:
        """Return the parts of the file, once it has been unpacked."""
        return [
            Piece(self.file, first_record=first, size=size, part=f"{self.key}/{name}")
            for name, first, size in read_lines(self.folder / _PARTS)
        ]

    def _read(self, block_bytes: int) -> Iterator[tuple[int, bytes | memoryview]]:
        """Whole records, and the number of the first of them."""
        path = Path(self.file.path)
        if self.file.format == "warc":
            yield from decompress_archive(path, self.file.compression, block_bytes)
            return
        for block in Source(path).read_blocks((), self.reading.text_documents, block_bytes):
            yield block.first_record, block.data
