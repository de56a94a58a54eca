"""Small corpora for tests, and the slow references that the native code is compared with."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_7b.data import IndexWriter

MASK64 = 2**64 - 1


def write_corpus(prefix: Path, documents: Sequence[Sequence[int]], *, token_bytes: int = 2) -> str:
    """Write documents of one sequence each; return the prefix."""
    writer = IndexWriter(str(prefix), token_bytes)
    for document in documents:
        writer.add_document(np.array(document, dtype=np.int64))
    writer.finish()
    return str(prefix)


def random_documents(seed: int, num_documents: int, *, max_length: int = 40, vocab_size: int = 1000) -> list[list[int]]:
    """Documents of 0 to max_length random ids."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, max_length + 1, num_documents)
    return [rng.integers(0, vocab_size, length).tolist() for length in lengths]


def mix(value: int, other: int | None = None) -> int:
    """SplitMix64's finaliser."""
    if other is not None:
        return mix(mix(value) ^ other)
    value = (value + 0x9E3779B97F4A7C15) & MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK64
    return value ^ (value >> 31)


def permute(index: int, size: int, key: int) -> int:
    """The Feistel network with cycle walking, written down plainly."""
    bits = max(2, (size - 1).bit_length())
    low_bits = bits // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << (bits - low_bits)) - 1
    while True:
        low, high = index & low_mask, index >> low_bits
        for half_round in range(0, 8, 2):
            low ^= mix((key + half_round) & MASK64, high) & low_mask
            high ^= mix((key + half_round + 1) & MASK64, low) & high_mask
        index = (high << low_bits) | low
        if index < size:
            return index


class ReferenceStream:
    """The order of one corpus by building what the native code never builds: the endless stream and every table."""

    def __init__(self, documents: Sequence[Sequence[int]], seq_length: int, key: int) -> None:
        self.ids = np.concatenate([np.array(document, dtype=np.int64) for document in documents])
        # A position's document begins at the last non-empty document's start at or before it.
        starts = np.concatenate([[0], np.cumsum([len(document) for document in documents])])
        self.starts = np.unique(starts[starts < len(self.ids)])
        self.seq_length = seq_length
        self.key = key

    def epoch_stream(self, epoch: int) -> NDArray[np.int64]:
        """The corpus's tokens in the order of one epoch's ring, [T]."""
        position = mix(mix(self.key, 2), epoch) % len(self.ids)
        start = self.starts[self.starts <= position].max()
        return (start + np.arange(len(self.ids))) % len(self.ids)

    def samples(self, count: int) -> NDArray[np.int64]:
        """The first samples, [count, s + 1]."""
        return self.ids[self.positions(count)]

    def document_begins(self, count: int) -> NDArray[np.bool_]:
        """Where in the first samples a document begins, [count, s + 1]; a sample's own beginning always counts."""
        begins = np.isin(self.positions(count), self.starts)
        begins[:, 0] = True
        return begins

    def positions(self, count: int) -> NDArray[np.int64]:
        """The corpus's tokens that the first samples hold, [count, s + 1]."""
        size, s = len(self.ids), self.seq_length
        num_epochs = count * s // size + 3
        endless = np.concatenate([self.epoch_stream(epoch) for epoch in range(num_epochs)])
        rows = []
        for epoch in range(num_epochs - 1):
            first, end = -(-epoch * size // s), -(-(epoch + 1) * size // s)
            order_key = mix(mix(self.key, 1), epoch)
            rows += [first + permute(i, end - first, order_key) for i in range(end - first)]
        return np.stack([endless[row * s : row * s + s + 1] for row in rows[:count]])
