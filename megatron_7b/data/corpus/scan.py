"""One pass over the files of a corpus: hash, size, and the range of the ids, in memory that does not grow with them.

Reading, hashing and comparing all release the GIL, so files are scanned side by side on threads; each byte is read from
the disk once, and is still in the processor's cache when its ids are looked at.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatron_7b.data.corpus.fingerprint import spot_hash
from megatron_7b.data.corpus.indexed_dataset import IndexedDataset
from megatron_7b.data.corpus.manifest import FileFacts

type Advance = Callable[[int], None]
"""Told, on any thread, how many more bytes have been read; an exception from it ends the scan."""

CHUNK_BYTES = 1 << 22
_DOCUMENTS_AT_ONCE = 1 << 20


def tell_nobody(_num_bytes: int) -> None:
    """Be an `Advance` that shows nothing."""


@dataclass(frozen=True, kw_only=True)
class IdFacts:
    """What the ids of a .bin are; None if there are none."""

    min_id: int | None
    max_id: int | None
    num_outside: int
    """Ids below 0 or not below the vocabulary's size."""
    first_outside: tuple[int, int] | None
    """Position in the .bin, in tokens, and value of the first of these."""


@dataclass(frozen=True, kw_only=True)
class ScannedBin:
    """A .bin after its pass."""

    file: FileFacts
    ids: IdFacts


def read_chunks(stream: BinaryIO, advance: Advance) -> Iterator[NDArray[np.uint8]]:
    """Yield the bytes of an unbuffered file in pieces of CHUNK_BYTES at most; each is valid until the next."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
    buffer = np.empty(CHUNK_BYTES, np.uint8)
    view = memoryview(buffer)
    filled = CHUNK_BYTES
    while filled == CHUNK_BYTES:
        filled = 0
        while filled < CHUNK_BYTES and (count := stream.readinto(view[filled:])):  # type: ignore[attr-defined]
            filled += count
        if filled:
            yield buffer[:filled]
            advance(filled)


def scan_file(file: Path, advance: Advance) -> FileFacts:
    """Size and hash.

    Raises:
        OSError: It cannot be read.
    """
    digest, size = xxhash.xxh3_128(), 0
    with file.open("rb", buffering=0) as stream:
        for chunk in read_chunks(stream, advance):
            digest.update(chunk.data)
            size += len(chunk)
    return FileFacts(size=size, xxh3_128=digest.hexdigest(), spots=spot_hash(file))


def scan_bin(file: Path, dtype: np.dtype[Any], vocab_size: int, advance: Advance) -> ScannedBin:
    """Size, hash and ids.

    Args:
        file: The .bin; bytes after its last whole id are hashed only.
        dtype: Of its ids.
        vocab_size: What ids must be below.
        advance: Told of the progress.

    Raises:
        OSError: It cannot be read.
    """
    digest, size, lows, highs, num_outside = xxhash.xxh3_128(), 0, [], [], 0
    first_outside = None
    with file.open("rb", buffering=0) as stream:
        for chunk in read_chunks(stream, advance):
            digest.update(chunk.data)
            ids = chunk[: len(chunk) // dtype.itemsize * dtype.itemsize].view(dtype)
            if len(ids):
                lows.append(int(ids.min()))
                highs.append(int(ids.max()))
                if lows[-1] < 0 or highs[-1] >= vocab_size:
                    outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
                    num_outside += len(outside)
                    position = size // dtype.itemsize + int(outside[0])
                    first_outside = first_outside or (position, int(ids[outside[0]]))
            size += len(chunk)
    return ScannedBin(
        file=FileFacts(size=size, xxh3_128=digest.hexdigest(), spots=spot_hash(file)),
        ids=IdFacts(
            min_id=min(lows, default=None),
            max_id=max(highs, default=None),
            num_outside=num_outside,
            first_outside=first_outside,
        ),
    )


def count_empty_documents(dataset: IndexedDataset) -> int:
    """Return how many documents have no token, in bounded memory. The structure must have been verified."""
    bounds, lengths, empty = dataset.document_indices, dataset.sequence_lengths, 0
    for first in range(0, dataset.num_documents, _DOCUMENTS_AT_ONCE):
        some = bounds[first : first + _DOCUMENTS_AT_ONCE + 1].astype(np.int64)
        ends = np.concatenate([[0], np.cumsum(lengths[some[0] : some[-1]], dtype=np.int64)])
        empty += int(np.count_nonzero(np.diff(ends[some - some[0]]) == 0))
    return empty


def document_of(dataset: IndexedDataset, position: int) -> int:
    """Return the number of the document that a token of the .bin belongs to. The structure must have been verified."""
    starts = dataset.corpus.sequence_pointers
    sequence = int(np.searchsorted(starts, position * dataset.dtype.itemsize, side="right")) - 1
    return int(np.searchsorted(dataset.document_indices, sequence, side="right")) - 1
