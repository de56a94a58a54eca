"""Torch's `.metadata`: which tensors a folder holds, and where in its files they are.

The file is a pickle, and a pickle can call whatever it names. This reader knows the few opcodes and names that torch's
own files have, and builds inert records for the names: nothing that a file names is ever imported or called. What the
records say is then checked before anyone uses it: files with a record, sections inside them, chunks that make up their
tensor.
"""

import io
import math
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from megatron_7b.checkpoint.records import Records

type Shape = tuple[int, ...]


@dataclass(frozen=True)
class Section:
    """Bytes of a file: its name in the folder of the index, the first byte, and how many."""

    file: str
    start: int
    length: int


@dataclass(frozen=True)
class StoredChunk:
    """A rectangle of a tensor in a file.

    Attributes:
        offsets: Of its first element in the whole tensor.
        shape: Of the rectangle.
        section: Where it was written.
    """

    offsets: Shape
    shape: Shape
    section: Section


@dataclass(frozen=True)
class StoredTensor:
    """A whole tensor, and the rectangles that make it up."""

    shape: Shape
    dtype: torch.dtype
    chunks: tuple[StoredChunk, ...]


@dataclass(frozen=True)
class Index:
    """What a folder holds, by name: tensors, and objects such as random states."""

    tensors: Mapping[str, StoredTensor]
    objects: Mapping[str, Section]


class IndexFormatError(ValueError):
    """A file is no index of a checkpoint; the message says why."""


def parse_index(content: bytes, files: Records) -> Index:
    """Read an index.

    Args:
        content: Of `.metadata`.
        files: Records of the files beside it, by the names that the index has for them.

    Raises:
        IndexFormatError: It names a class that no index needs, or what it says cannot be true.
    """
    try:
        metadata = _Unpickler(io.BytesIO(content)).load()
    except IndexFormatError:
        raise
    except Exception as error:  # a pickle that was not written by torch can fail in any way
        raise IndexFormatError(f"it cannot be read ({type(error).__name__}: {error})") from error
    return _Checked(files).index(metadata)


class _Record:
    """Stands for an object in the pickle. It keeps the state that it is given, and does nothing."""

    state: Any = None

    def __init__(self, *arguments: object) -> None:
        """Accept, and forget, whatever the object was made of."""

    def __setstate__(self, state: object) -> None:
        self.state = state


_PACKAGE = "torch.distributed.checkpoint"
_KNOWN = {
    f"{_PACKAGE}.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    # megatron-core adds the plans of all ranks, which nothing here needs.
    f"{_PACKAGE}.planner": ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
    f"{_PACKAGE}.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),
}
_RECORDS: Mapping[tuple[str, str], type[_Record]] = {
    (module, name): type(name, (_Record,), {}) for module, names in _KNOWN.items() for name in names
}
_DTYPES: Mapping[str, torch.dtype] = {
    name: dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)
}


_OPCODES = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1),
    *(pickle.SHORT_BINUNICODE, pickle.BINUNICODE, pickle.EMPTY_TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.TUPLE, pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT, pickle.SETITEM),
    *(pickle.SETITEMS, pickle.STACK_GLOBAL, pickle.NEWOBJ, pickle.REDUCE, pickle.BUILD),
)
"""What an index is written with. Among the others are those that ask for any amount of memory in a few bytes."""


class _Unpickler(pickle._Unpickler):  # the one in Python, because the one in C knows all opcodes
    dispatch: ClassVar = {code[0]: pickle._Unpickler.dispatch[code[0]] for code in _OPCODES}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) not in _RECORDS:
            raise IndexFormatError(f"it names {module}.{name}, which no checkpoint needs and which could run code")
        return _RECORDS[module, name]


class _Checked:
    """Builds an index of records, and believes none of them."""

    def __init__(self, files: Records) -> None:
        self._files = files
        self._sections: dict[tuple[str, Shape | None], Section] = {}

    def index(self, metadata: object) -> Index:
        fields = _fields(metadata, "Metadata")
        for key, place in _items(fields, "storage_data"):
            self._add_section(_fields(key, "MetadataIndex"), _fields(place, "_StorageInfo"))
        tensors: dict[str, StoredTensor] = {}
        objects: dict[str, Section] = {}
        for name, entry in _items(fields, "state_dict_metadata"):
            if not isinstance(name, str):
                raise IndexFormatError(f"a tensor has a {type(name).__name__} for a name")
            if type(entry) is _RECORDS[f"{_PACKAGE}.metadata", "BytesStorageMetadata"]:
                objects[name] = self._section(name, None)
            else:
                tensors[name] = self._tensor(name, _fields(entry, "TensorStorageMetadata"))
        return Index(tensors, objects)

    def _add_section(self, key: Mapping[str, object], place: Mapping[str, object]) -> None:
        name, offset = key.get("fqn"), key.get("offset")
        file, start, length = place.get("relative_path"), place.get("offset"), place.get("length")
        if not isinstance(name, str) or not isinstance(file, str) or not (type(start) is type(length) is int):
            raise IndexFormatError(f"a part of {name if isinstance(name, str) else 'a tensor'} has no place in a file")
        if file not in self._files:
            raise IndexFormatError(f"{name} is in {file!r:.200}, which has no record in checkpoint.json")
        assert isinstance(start, int)
        assert isinstance(length, int)
        if start < 0 or length < 0 or start + length > self._files[file].bytes:
            raise IndexFormatError(f"{name} lies outside its file {file}")
        if place.get("transform_descriptors"):
            raise IndexFormatError(f"{name} is compressed or encrypted, which is not supported")
        where = (name, None if offset is None else _shape(name, offset))
        if where in self._sections:
            raise IndexFormatError(f"a part of {name} is stored twice")
        self._sections[where] = Section(file, start, length)

    def _section(self, name: str, offsets: Shape | None) -> Section:
        if (name, offsets) not in self._sections:
            raise IndexFormatError(f"a part of {name} is stored nowhere")
        return self._sections[name, offsets]

    def _tensor(self, name: str, fields: Mapping[str, object]) -> StoredTensor:
        properties = fields.get("properties")
        state = properties.state if isinstance(properties, _Record) else None
        if not isinstance(state, tuple) or not state or not isinstance(state[0], torch.dtype):
            raise IndexFormatError(f"{name} has no number format")
        shape, chunks = _shape(name, fields.get("size")), fields.get("chunks")
        if not isinstance(chunks, list):
            raise IndexFormatError(f"{name} has no parts")
        stored = tuple(self._chunk(name, shape, _fields(chunk, "ChunkStorageMetadata")) for chunk in chunks)
        if sum(math.prod(chunk.shape) for chunk in stored) != math.prod(shape):
            raise IndexFormatError(f"the parts of {name} do not make up its shape {shape}")
        return StoredTensor(shape, state[0], stored)

    def _chunk(self, name: str, whole: Shape, fields: Mapping[str, object]) -> StoredChunk:
        offsets, shape = _shape(name, fields.get("offsets")), _shape(name, fields.get("sizes"))
        if not len(offsets) == len(shape) == len(whole) or any(
            first + length > limit for first, length, limit in zip(offsets, shape, whole, strict=True)
        ):
            raise IndexFormatError(f"a part of {name} lies outside its shape {whole}")
        return StoredChunk(offsets, shape, self._section(name, offsets))


def _fields(record: object, name: str) -> Mapping[str, object]:
    state = record.state if isinstance(record, _Record) and type(record).__name__ == name else None
    if not isinstance(state, dict):
        raise IndexFormatError(f"it holds a {type(record).__name__} instead of a {name}")
    return state


def _items(fields: Mapping[str, object], name: str) -> Iterator[tuple[Any, Any]]:
    value = fields.get(name)
    if not isinstance(value, dict):
        raise IndexFormatError(f"it has no {name}")
    yield from value.items()


def _shape(name: str, value: object) -> Shape:
    if type(value) is not tuple or any(type(size) is not int or size < 0 for size in value):
        raise IndexFormatError(f"{name} has a shape or an offset that is no tuple of natural numbers")
    return value
