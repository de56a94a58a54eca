"""Telling files apart without reading them whole: a hash of blocks that are spread evenly over a file.

Another file of the same size differs in almost every block; an interrupted copy lacks its last ones. A single changed
bit of a large file is found only by hashing all of it: `megatron-7b data verify`, or `data.verify full`.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from megatron_7b.data.corpus.publish import SIDE_SUFFIXES

NUM_SPOTS = 32
SPOT_BYTES = 4096


def spot_hash(file: Path) -> str:
    """xxh3_128 of a file's size and of NUM_SPOTS blocks of it, the first and the last among them.

    A file of up to NUM_SPOTS * SPOT_BYTES bytes is read whole.

    Raises:
        OSError: It cannot be read.
    """
    descriptor = os.open(file, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        digest = xxhash.xxh3_128(size.to_bytes(8, "little"))
        for begin in spot_offsets(size):
            digest.update(os.pread(descriptor, SPOT_BYTES, begin))
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def spot_offsets(size: int) -> list[int]:
    """Return where the blocks of a file of `size` bytes begin, in bytes."""
    if size <= NUM_SPOTS * SPOT_BYTES:
        return list(range(0, size, SPOT_BYTES))
    return [spot * (size - SPOT_BYTES) // (NUM_SPOTS - 1) for spot in range(NUM_SPOTS)]


@dataclass(frozen=True)
class CorpusSpots:
    """The `spot_hash` of the files of a corpus."""

    bin: str
    idx: str
    beside: Mapping[str, str] = field(default_factory=dict)
    """Of the further files of records, by ending; empty for other corpora."""

    @property
    def fingerprint(self) -> str:
        """What a corpus is, wherever its files are."""
        return self.bin + self.idx + "".join(self.beside.values())


def corpus_spots(prefix: str) -> CorpusSpots:
    """Read the spots of all files.

    Args:
        prefix: As `resolve_prefix` returns it.

    Raises:
        OSError: A file cannot be read.
    """
    beside = {suffix: Path(prefix + suffix) for suffix in SIDE_SUFFIXES}
    return CorpusSpots(
        bin=spot_hash(Path(f"{prefix}.bin")),
        idx=spot_hash(Path(f"{prefix}.idx")),
        beside={suffix: spot_hash(file) for suffix, file in beside.items() if file.exists()},
    )
