"""Texts in memory as samples: packed into rows, to be made into vectors."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_7b.data.samples.dataset import Batch, RecordsOfBatch
from megatron_7b.data.samples.packing import pack_documents


class TextRows:
    """Texts by row number; in attention they are kept apart.

    Args:
        texts: Tokens of each, at least one and at most `seq_length`.
        seq_length: Tokens of a row.
    """

    def __init__(self, texts: Sequence[NDArray[np.int32]], seq_length: int) -> None:
        self._texts, self._seq_length = texts, seq_length
        self._packing = pack_documents(np.array([len(text) for text in texts], np.int64), seq_length)

    @property
    def num_samples(self) -> int:
        """Rows."""
        return self._packing.num_rows

    def batch(self, rows: NDArray[np.int64]) -> Batch:
        """Return some rows, [b, s]; `records.numbers` says which text each is."""
        shape = (len(rows), self._seq_length)
        tokens, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        begins, numbers, segments = [], [], []
        for place, row in enumerate(rows):
            end = 0
            for number in self._packing.document[slice(*self._packing.row_begin[row : row + 2])].tolist():
                ids = self._texts[number]
                begins.append(place * self._seq_length + end)
                numbers.append(number)
                tokens[place, end : end + len(ids)] = ids
                positions[place, end : end + len(ids)] = np.arange(len(ids))
                end += len(ids)
            if end < self._seq_length:
                segments.append(place * self._seq_length + end)
                positions[place, end:] = np.arange(self._seq_length - end)
        nothing = np.zeros(shape, np.float32)
        records = RecordsOfBatch(
            begins=np.array(begins, np.int64),
            lengths=np.array([len(self._texts[number]) for number in numbers], np.int64),
            record=np.arange(len(numbers)),
            numbers=np.array(numbers, np.int64),
            values=np.empty((len(numbers), 0), np.float32),
            token_values=nothing,
        )
        boundaries = np.array([*sorted([*begins, *segments]), tokens.size], np.int32)
        return Batch(tokens, tokens, nothing, positions, boundaries, records=records)
