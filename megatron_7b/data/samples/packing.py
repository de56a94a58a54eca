"""Whole documents packed into rows of a fixed length: for fine-tuning, where cutting a document spoils it.

Best-fit decreasing: the longest document first, each into the fullest row that still has room for it. Only a document
that is longer than a row is cut: into full rows of its own, and a rest that is packed like any other. The native code
keeps the rows in buckets by the room that is left, so packing n documents takes time linear in n.

`pack_documents` says which document goes where; `PackedDataset` reads batches by it, which `BatchLoader` and the
training step take like any other: documents are kept apart by `cu_seqlens`, padding has loss mask 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_7b.data._index import Permutation, pack_best_fit
from megatron_7b.data.corpus.indexed_dataset import IndexedDataset
from megatron_7b.data.samples.dataset import Batch
from megatron_7b.data.samples.sampling import stream_key
from megatron_7b.errors import DataFormatError


@dataclass(frozen=True)
class Packing:
    """Which pieces of which documents make up each row.

    Row r consists of pieces `row_begin[r]` to `row_begin[r + 1] - 1`, in the order of their documents.
    """

    seq_length: int
    row_begin: NDArray[np.int64]
    """[rows + 1]."""
    document: NDArray[np.int64]
    """The document of each piece, [pieces]."""
    offset: NDArray[np.int64]
    """The piece's first token within its document, [pieces]; 0 but for what is left of a document that was cut."""
    length: NDArray[np.int64]
    """Tokens of each piece, [pieces]."""

    @property
    def num_rows(self) -> int:
        """Rows."""
        return len(self.row_begin) - 1

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.length.sum())

    @property
    def utilisation(self) -> float:
        """Share of the rows' places that hold a token; the rest is padding."""
        return self.num_tokens / (self.num_rows * self.seq_length) if self.num_rows else 1.0


def pack_documents(lengths: NDArray[np.integer], seq_length: int) -> Packing:
    """Pack documents into rows.

    Args:
        lengths: Tokens of each document, [documents]; empty ones are left out.
        seq_length: Tokens of a row.

    Raises:
        ValueError: A length is negative, or the rows are not of at least one token.
    """
    return Packing(seq_length, *pack_best_fit(np.ascontiguousarray(lengths, dtype=np.int64), seq_length))


class PackedDataset:
    """The documents of a corpus in packed rows, by global sample number: shuffled in each epoch, without end.

    A row holds each of its pieces as inputs, and as labels the tokens that follow within the document. The last token
    of a document has no label, and neither has padding: their loss mask is 0.
    """

    def __init__(self, prefix: str | Path, *, seq_length: int, seed: int, pad_id: int) -> None:
        """Open and pack a corpus; takes time and memory proportional to its number of documents.

        Args:
            prefix: The corpus; each of its documents is a unit.
            seq_length: Tokens per sample.
            seed: Decides the order of the rows.
            pad_id: What fills a row up; also the label if there is none.

        Raises:
            DataFormatError: A file is damaged, or holds no tokens.
        """
        self.corpus = IndexedDataset(prefix)
        self.seq_length = seq_length
        self.packing = pack_documents(self.corpus.document_lengths(), seq_length)
        if self.packing.num_rows == 0:
            raise DataFormatError(f"{self.corpus.prefix} holds no tokens to pack")
        self._pad_id = pad_id
        self._key = stream_key(seed, "train", 0)

    @property
    def num_samples(self) -> int:
        """Rows, which is samples per epoch."""
        return self.packing.num_rows

    def row_of(self, index: int) -> int:
        """Return the row that a global sample number reads: each of them once per epoch."""
        epoch, place = divmod(index, self.num_samples)
        return Permutation(self.num_samples, (self._key + epoch) % 2**64)(place)

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> Batch:
        """Return the samples of these numbers; `cu_seqlens` has a segment for each piece, and one for padding."""
        shape = (len(indices), self.seq_length)
        tokens = np.full(shape, self._pad_id, dtype=np.int64)
        labels = np.full(shape, self._pad_id, dtype=np.int64)
        loss_mask = np.zeros(shape, dtype=np.float32)
        position_ids = np.zeros(shape, dtype=np.int64)
        begins = []
        for row, index in enumerate(indices):
            place = 0
            for piece in range(*self.packing.row_begin[(number := self.row_of(int(index))) : number + 2]):
                begins.append(row * self.seq_length + place)
                place += self._write_piece(piece, place, tokens[row], labels[row], loss_mask[row], position_ids[row])
            if place < self.seq_length:
                begins.append(row * self.seq_length + place)
                position_ids[row, place:] = np.arange(self.seq_length - place)
        return Batch(tokens, labels, loss_mask, position_ids, np.array([*begins, tokens.size], dtype=np.int32))

    def _write_piece(
        self,
        piece: int,
        place: int,
        tokens: NDArray[np.int64],
        labels: NDArray[np.int64],
        loss_mask: NDArray[np.float32],
        position_ids: NDArray[np.int64],
    ) -> int:
        """Write one piece into a row from a place on, [s] each; returns its length."""
        packing = self.packing
        offset, length = int(packing.offset[piece]), int(packing.length[piece])
        document = self.corpus.document(int(packing.document[piece]))
        tokens[place : place + length] = document[offset : offset + length]
        following = document[offset + 1 : offset + length + 1]
        labels[place : place + len(following)] = following
        loss_mask[place : place + len(following)] = 1.0
        position_ids[place : place + length] = np.arange(length)
        return length
