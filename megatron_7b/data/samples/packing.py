"""Whole documents packed into rows of a fixed length: for fine-tuning, where cutting a document spoils it.

Best-fit decreasing: the longest document first, each into the fullest row that still has room for it. Only a document
that is longer than a row is cut: into full rows of its own, and a rest that is packed like any other. The native code
keeps the rows in buckets by the room that is left, so packing n documents takes time linear in n.

`data.records.rows` reads rows by it.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megatron_7b.data._index import pack_best_fit


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
