"""Tensors of a checkpoint, read in any rectangles, whichever rectangles were written.

Nothing that is in a checkpoint is run: its index builds inert records only (`index.py`), and what a file holds is
loaded by torch as plain tensors (`weights_only`). Only files with a record are opened. Every rank reads for itself.
"""

import io
import itertools
import pickle
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_7b.checkpoint.index import IndexFormatError, Section, StoredChunk, StoredTensor, parse_index
from megatron_7b.checkpoint.pieces import Block, Piece
from megatron_7b.checkpoint.records import INDEX, Records, advice_on_damage, names_below, read_recorded, recorded_file
from megatron_7b.errors import CheckpointError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


class StoredTensors:
    """What a checkpoint, or a folder in it, holds.

    Args:
        folder: The checkpoint.
        files: Its records.
        part: A folder in it, such as `optimizer`; empty means the checkpoint itself.
        renamed: From the name that a tensor was stored under to the one that it is read by; None leaves them.

    Attributes:
        tensors: By name: shape, number format, and where the parts are.

    Raises:
        CheckpointError: The index is missing, has no record, is damaged, or says what cannot be true.
    """

    def __init__(
        self, folder: Path, files: Records, part: str = "", *, renamed: Callable[[str], str] | None = None
    ) -> None:
        self._folder, self._files = folder, files
        self._prefix = f"{part}/" if part else ""
        index = read_recorded(folder, files, self._prefix + INDEX)
        beside = {
            name.removeprefix(self._prefix): files[name] for name in (names_below(files, part) if part else files)
        }
        try:
            content = parse_index(index, beside)
        except IndexFormatError as error:
            raise CheckpointError(
                f"{folder / self._prefix / INDEX} is not used: {error}", hint=advice_on_damage(folder)
            ) from error
        self.tensors = {renamed(name) if renamed else name: entry for name, entry in content.tensors.items()}
        self._objects = content.objects

    def read(self, pieces: Iterable[Piece]) -> None:
        """Fill pieces. What is beyond the stored tensor becomes zero.

        Raises:
            CheckpointError: A tensor is not there, or a file cannot be read.
        """
        wanted: dict[StoredChunk, list[Piece]] = {}
        for piece in pieces:
            piece.data.zero_()
            stored = self._tensor(piece.name)
            if len(stored.shape) != len(piece.place.shape):
                raise CheckpointError(
                    f"{self._folder}: {piece.name} has shape {stored.shape}, the model has {piece.place.whole_shape}"
                )
            for chunk in stored.chunks:
                if _overlaps(chunk, piece.place):
                    wanted.setdefault(chunk, []).append(piece)
        by_file = attrgetter("section.file")
        for name, chunks in itertools.groupby(sorted(wanted, key=attrgetter("section.file", "section.start")), by_file):
            with self._opened(name) as file:
                for chunk in chunks:
                    values = self._read_chunk(file, chunk, wanted[chunk][0].name)
                    for piece in wanted[chunk]:
                        _copy_overlap(chunk, values, piece)

    def read_object(self, name: str) -> object:
        """Read an object that consists of tensors, texts and numbers.

        Raises:
            CheckpointError: It is not there, holds anything else, or its file cannot be read.
        """
        if name not in self._objects:
            raise CheckpointError(f"{self._folder} has no {name}", hint=advice_on_damage(self._folder))
        section = self._objects[name]
        with self._opened(section.file) as file:
            return self._load(file, section, name)

    def _tensor(self, name: str) -> StoredTensor:
        if name not in self.tensors:
            raise CheckpointError(f"{self._folder} has no tensor {self._prefix}{name}")
        return self.tensors[name]

    def _opened(self, name: str) -> io.BufferedReader:
        path = recorded_file(self._folder, self._files, self._prefix + name)
        try:
            return path.open("rb")
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}", hint=advice_on_damage(self._folder)) from error

    def _read_chunk(self, file: io.BufferedReader, chunk: StoredChunk, name: str) -> Tensor:
        values = self._load(file, chunk.section, name)
        expected = self._tensor(name).dtype
        if type(values) is not Tensor or tuple(values.shape) != chunk.shape or values.dtype != expected:
            found = f"{values.dtype} {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise CheckpointError(
                f"{file.name}: a part of {name} is {found}, expected {expected} {chunk.shape}",
                hint=advice_on_damage(self._folder),
            )
        return values

    def _load(self, file: io.BufferedReader, section: Section, name: str) -> object:
        try:
            view: Any = _View(file, section)  # torch asks of a file no more than this
            return torch.load(view, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:  # whose words advise to load it nevertheless
            raise CheckpointError(
                f"{file.name}: {name} holds something else than plain tensors",
                hint=advice_on_damage(self._folder),
            ) from error
        except Exception as error:  # what torch does not recognize can fail in any way
            raise CheckpointError(
                f"{file.name}: {name} cannot be read: {error}", hint=advice_on_damage(self._folder)
            ) from error


class _View(io.RawIOBase):
    """A section of a file as a file of its own."""

    def __init__(self, file: io.BufferedReader, section: Section) -> None:
        super().__init__()
        self._file, self._section = file, section
        self.seek(0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self._section.length}[whence]
        return self._file.seek(self._section.start + base + offset) - self._section.start

    def tell(self) -> int:
        return self._file.tell() - self._section.start

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        left = max(self._section.length - self.tell(), 0)
        return self._file.readinto(memoryview(buffer)[:left])


def _ranges(chunk: StoredChunk, place: Block) -> Iterator[tuple[int, int]]:
    """First and last element + 1 of what two rectangles share, per dimension; empty where they do not meet."""
    for chunk_first, chunk_size, first, size in zip(
        chunk.offsets, chunk.shape, place.offsets, place.shape, strict=True
    ):
        yield max(chunk_first, first), min(chunk_first + chunk_size, first + size)


def _overlaps(chunk: StoredChunk, place: Block) -> bool:
    return all(start < stop for start, stop in _ranges(chunk, place))


def _copy_overlap(chunk: StoredChunk, values: Tensor, piece: Piece) -> None:
    shared = list(_ranges(chunk, piece.place))
    source = tuple(
        slice(start - first, stop - first) for (start, stop), first in zip(shared, chunk.offsets, strict=True)
    )
    target = tuple(
        slice(start - first, stop - first) for (start, stop), first in zip(shared, piece.place.offsets, strict=True)
    )
    piece.data[target].copy_(values[source])
