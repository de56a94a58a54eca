"""Calibration text as a model reads it."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_7b.data import Batch


class TextSamples:
    """Samples of equally many tokens, of which every token but the first is predicted.

    Args:
        samples: Token ids, each one more than the model reads.
    """

    def __init__(self, samples: Sequence[Sequence[int]]) -> None:
        self._ids = np.array(samples, dtype=np.int64)

    @property
    def num_samples(self) -> int:
        """Samples."""
        return len(self._ids)

    @property
    def seq_length(self) -> int:
        """Tokens that the model reads of each."""
        return int(self._ids.shape[1]) - 1

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> Batch:
        """Return samples; numbers beyond the end begin again."""
        rows = self._ids[np.asarray(indices) % len(self._ids)]
        positions = np.broadcast_to(np.arange(self.seq_length), (len(rows), self.seq_length))
        return Batch(
            tokens=np.ascontiguousarray(rows[:, :-1]),
            labels=np.ascontiguousarray(rows[:, 1:]),
            loss_mask=np.ones((len(rows), self.seq_length), dtype=np.float32),
            position_ids=np.ascontiguousarray(positions),
        )
