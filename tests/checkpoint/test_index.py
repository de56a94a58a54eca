"""Torch's `.metadata`: read as torch writes it, with nothing imported, and believed only where it is consistent."""

import contextlib
import datetime
import itertools
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_7b.checkpoint.index import IndexFormatError, Section, StoredChunk, StoredTensor, parse_index
from megatron_7b.checkpoint.records import FileRecord
from tests.support.checkpoint_runs import train_save
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import tiny_config

FILES = {"__0_0.distcp": FileRecord(1000, "0" * 32)}


def metadata() -> Metadata:
    """Of a 4 × 3 tensor in two parts, and an object."""
    chunks = [ChunkStorageMetadata(torch.Size((row, 0)), torch.Size((2, 3))) for row in (0, 2)]
    return Metadata(
        {
            "w": TensorStorageMetadata(TensorProperties(dtype=torch.bfloat16), torch.Size((4, 3)), chunks),
            "o": BytesStorageMetadata(),
        },
        storage_data={
            MetadataIndex("w", (0, 0), 0): _StorageInfo("__0_0.distcp", 0, 500),
            MetadataIndex("w", (2, 0), 1): _StorageInfo("__0_0.distcp", 500, 400),
            MetadataIndex("o"): _StorageInfo("__0_0.distcp", 900, 100),
        },
    )


def test_what_torch_writes_is_understood() -> None:
    for protocol in range(4, pickle.HIGHEST_PROTOCOL + 1):  # 4 was the default before Python 3.14
        index = parse_index(pickle.dumps(metadata(), protocol), FILES)
        parts = [StoredChunk((row, 0), (2, 3), Section("__0_0.distcp", start, length)) for row, start, length in
                 ((0, 0, 500), (2, 500, 400))]  # fmt: skip
        assert index.tensors == {"w": StoredTensor((4, 3), torch.bfloat16, tuple(parts))}
        assert index.objects == {"o": Section("__0_0.distcp", 900, 100)}


def test_it_says_what_torch_itself_reads(tmp_path: Path) -> None:
    config = tiny_config(parallel={"use_distributed_optimizer": True}, precision={"params_dtype": "bf16"})
    run_ranks(2, train_save, config, tmp_path, 1)
    for folder in (tmp_path / "latest", tmp_path / "latest" / "optimizer"):
        content = (folder / ".metadata").read_bytes()
        files = {path.name: FileRecord(path.stat().st_size, "") for path in folder.iterdir()}
        index, expected = parse_index(content, files), pickle.loads(content)
        for name, entry in expected.state_dict_metadata.items():
            if isinstance(entry, BytesStorageMetadata):
                assert name in index.objects
                continue
            found = index.tensors[name]
            assert (found.shape, found.dtype) == (tuple(entry.size), entry.properties.dtype)
            for chunk, stored in zip(found.chunks, entry.chunks, strict=True):
                assert (chunk.offsets, chunk.shape) == (tuple(stored.offsets), tuple(stored.sizes))
                place = expected.storage_data[MetadataIndex(name, stored.offsets)]
                assert chunk.section == Section(place.relative_path, place.offset, place.length)
        assert len(index.tensors) + len(index.objects) == len(expected.state_dict_metadata)


def stored_at(index: MetadataIndex, **fields: object) -> Callable[[Metadata], None]:
    def change(content: Metadata) -> None:
        content.storage_data[index] = replace(content.storage_data[index], **fields)

    return change


W, O = MetadataIndex("w", (0, 0)), MetadataIndex("o")  # noqa: E741
FALSE: dict[str, tuple[Callable[[Metadata], object], str]] = {
    "absolute": (stored_at(W, relative_path="/etc/hostname"), "'/etc/hostname', which has no record"),
    "above": (stored_at(W, relative_path="../other/__0_0.distcp"), "which has no record"),
    "beside": (stored_at(W, relative_path="__1_0.distcp"), "which has no record"),
    "number": (stored_at(W, relative_path=0), "a part of w has no place"),
    "beyond": (stored_at(O, length=101), "o lies outside its file"),
    "before": (stored_at(W, offset=-1), "w lies outside its file"),
    "no number": (stored_at(W, offset=None), "a part of w has no place"),
    "transformed": (stored_at(W, transform_descriptors=["zstd"]), "compressed"),
    "nowhere": (lambda content: content.storage_data.pop(W), "a part of w is stored nowhere"),
    "object nowhere": (lambda content: content.storage_data.pop(O), "a part of o is stored nowhere"),
    "gap": (lambda content: content.state_dict_metadata["w"].chunks.pop(), "do not make up its shape"),
    "outside": (
        lambda content: setattr(content.state_dict_metadata["w"], "size", torch.Size((3, 4))),
        "lies outside its shape",
    ),
    "flat": (lambda content: setattr(content.state_dict_metadata["w"], "size", torch.Size((12,))), "outside its shape"),
    "no parts": (lambda content: setattr(content.state_dict_metadata["w"], "chunks", None), "w has no parts"),
    "no format": (lambda content: setattr(content.state_dict_metadata["w"], "properties", None), "no number format"),
    "name": (lambda content: content.state_dict_metadata.update({3: BytesStorageMetadata()}), "has a int for a name"),
    "kind": (lambda content: content.state_dict_metadata.update(w=W), "instead of a TensorStorageMetadata"),
    "no storage": (lambda content: setattr(content, "storage_data", None), "has no storage_data"),
}


@pytest.mark.parametrize("case", FALSE)
def test_what_cannot_be_true_is_refused(case: str) -> None:
    change, complaint = FALSE[case]
    content = metadata()
    change(content)
    with pytest.raises(IndexFormatError, match=complaint):
        parse_index(pickle.dumps(content), FILES)


class Calling:
    """Unpickling it calls a function, which here does nothing."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self._call


@pytest.mark.parametrize(
    "foreign",
    [
        Calling(eval, "1"),
        Calling(getattr, "", "join"),
        Calling(torch.load, "/nowhere"),
        Calling(math.floor, 1),
        datetime.date(2000, 1, 1),
        torch.zeros(2),
        torch.distributed.checkpoint.filesystem.FileSystem,
        Path.exists,
    ],
    ids=["eval", "getattr", "torch.load", "math.floor", "a date", "a tensor", "a class", "a method"],
)
def test_nothing_else_is_imported(foreign: object) -> None:
    """Neither instead of the index, nor anywhere in it."""
    inside = metadata()
    inside.planner_data = foreign
    for content in (foreign, inside):
        with pytest.raises(IndexFormatError, match="which no checkpoint needs"):
            parse_index(pickle.dumps(content), FILES)


def test_a_pickle_cannot_change_the_reader() -> None:
    """BUILD gives a state to whatever lies on the stack, classes included."""
    name = pickle.PROTO + b"\x04" + _text("torch.distributed.checkpoint.metadata") + _text("Metadata") + b"\x93"
    attributes = pickle.EMPTY_DICT + _text("state") + pickle.NEWTRUE + pickle.SETITEM
    for state in (attributes, pickle.NONE + attributes + pickle.TUPLE2):
        with pytest.raises(IndexFormatError, match="cannot be read"):
            parse_index(name + state + pickle.BUILD + pickle.STOP, FILES)
    assert parse_index(pickle.dumps(metadata()), FILES).tensors


@pytest.mark.parametrize(
    "greedy",
    [
        b"N" + pickle.LONG_BINPUT + b"\xff\xff\xff\xff",
        pickle.BYTEARRAY8 + b"\0\0\0\0\xff\0\0\0",
        pickle.BINBYTES8 + b"\0\0\0\0\xff\0\0\0",
        pickle.LONG4 + b"\xff\xff\xff\x7f",
    ],
)
def test_a_few_bytes_cannot_ask_for_gigabytes(greedy: bytes) -> None:
    with pytest.raises(IndexFormatError, match="cannot be read"):
        parse_index(pickle.PROTO + b"\x04" + greedy + pickle.STOP, FILES)


def _text(text: str) -> bytes:
    return pickle.SHORT_BINUNICODE + bytes([len(text)]) + text.encode()


def test_every_flip_is_refused_or_understood() -> None:
    content = pickle.dumps(metadata())
    for position, bit in itertools.product(range(len(content)), range(8)):
        damaged = content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]
        with contextlib.suppress(IndexFormatError):
            parse_index(damaged, FILES)
