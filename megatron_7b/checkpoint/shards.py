"""Writing tensors in pieces: a file per rank, hashed as it is written, and one index over the files of all ranks.

The format is that of torch's distributed checkpoints, which torch reads. Writing is apart from all communication: a
rank writes its shard by itself, and whoever has the accounts of all ranks writes the index. So a shard can be written
at any time, by any thread.
"""

import io
import itertools
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, BinaryIO, Self, cast

import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from megatron_7b import upstream
from megatron_7b.checkpoint.pieces import Piece
from megatron_7b.checkpoint.records import INDEX, FileRecord
from megatron_7b.files import replacing

_NO_OBJECTS: Mapping[str, bytes] = MappingProxyType({})


@dataclass(frozen=True)
class Shard:
    """What one rank has written into a folder, without the values.

    Attributes:
        items: The pieces and objects.
        places: Where each of them is in the file.
        file: Its name in the folder.
        record: Its size and hash.
    """

    items: list[WriteItem]
    places: list[Any]
    file: str
    record: FileRecord


def write_shard(folder: Path, rank: int, pieces: Iterable[Piece], objects: Mapping[str, bytes] = _NO_OBJECTS) -> Shard:
    """Write the pieces of one rank into a file, and wait for the disk.

    Args:
        folder: Receives the file; created if necessary.
        rank: Names the file.
        pieces: On any device.
        objects: From `packed`, by name; no other rank writes one of the same name.

    Returns:
        The account that the index is written from.

    Collective: none.

    Raises:
        OSError: It could not be written to its end.
    """
    folder.mkdir(exist_ok=True)
    name = f"__{rank}_0.distcp"
    items: list[WriteItem] = []
    places: list[Any] = []
    with _HashedFile(folder / name) as file:
        for item, value in itertools.chain(_of_objects(objects), _of_pieces(pieces)):
            start = file.size
            if isinstance(value, bytes):
                file.write(value)
            else:
                torch.save(value, cast(IO[bytes], file))  # it asks for no more
            items.append(item)
            places.append(upstream.stored_at(name, start, file.size - start))
        file.finish()
    return Shard(items, places, name, file.record)


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """Write the index over the shards of all ranks, which together cover each tensor exactly once.

    torch's own writer adds the path and a random number, so that no two indices are equal.

    Collective: none.

    Raises:
        ValueError: They overlap, or leave gaps.
        OSError: It could not be written.
    """
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    _, metadata = planner.create_global_plan([SavePlan(shard.items) for shard in shards])
    metadata.storage_data = {
        item.index: place for shard in shards for item, place in zip(shard.items, shard.places, strict=True)
    }
    with replacing(folder / INDEX) as beside:
        beside.write_bytes(pickle.dumps(metadata))


def packed(value: object) -> bytes:
    """Return an object of tensors, texts and numbers as it is stored: in a list, as megatron-core does it."""
    content = io.BytesIO()
    torch.save([value], content)
    return content.getvalue()


def _of_objects(objects: Mapping[str, bytes]) -> Iterator[tuple[WriteItem, bytes]]:
    for name, content in objects.items():
        yield WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO), content


def _of_pieces(pieces: Iterable[Piece]) -> Iterator[tuple[WriteItem, Tensor]]:
    for piece in pieces:
        offsets, shape = torch.Size(piece.place.offsets), torch.Size(piece.place.shape)
        item = WriteItem(
            MetadataIndex(piece.name, offsets),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=ChunkStorageMetadata(offsets, shape),
                properties=TensorProperties.create_from_tensor(piece.data),
                size=torch.Size(piece.place.whole_shape),
            ),
        )
        yield item, _by_itself(piece.data)


def _by_itself(data: Tensor) -> Tensor:
    """Return a tensor in host memory with a storage of its own size; torch.save writes a storage whole."""
    data = data.detach().cpu()
    return data if data.untyped_storage().nbytes() == data.numel() * data.itemsize else data.clone()


class _HashedFile:
    """A new file that is hashed while it is written, and that says why it could not be written.

    torch.save, whose C++ calls `write`, raises an error of its own instead, which has lost the reason.
    """

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb")
        self._digest = xxhash.xxh3_128()
        self._failure: OSError | None = None
        self.size = 0
        """Bytes so far."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._attempt(self._file.close)
        if self._failure is not None:
            raise self._failure from None

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes."""
        self._attempt(self._file.write, data)
        self._digest.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Hand everything to the system."""
        self._attempt(self._file.flush)

    def finish(self) -> None:
        """Wait for the disk."""
        self.flush()
        self._attempt(os.fsync, self._file.fileno())

    @property
    def record(self) -> FileRecord:
        """Size and hash."""
        return FileRecord(self.size, self._digest.hexdigest())

    def _attempt(self, action: Callable[..., object], *arguments: object) -> None:
        try:
            action(*arguments)
        except OSError as error:
            self._failure = self._failure or OSError(error.errno, error.strerror, self._file.name)
            raise self._failure from error
