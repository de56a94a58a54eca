"""Signatures of many shards, mapped from disk and numbered through."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROWS_IN_MEMORY = 20_000_000
"""Keys that are sorted at once, some 30 bytes each; more documents than these are sorted in several passes."""


class SignatureFiles[T: np.generic]:
    """Rows of `.npy` files as one matrix that need not fit into memory.

    Args:
        paths: One file per shard, all of one dtype and width.
        dtype: Theirs.
    """

    def __init__(self, paths: Sequence[Path], dtype: type[T]) -> None:
        self._parts: list[NDArray[T]] = [_map(path) for path in paths]
        assert all(part.dtype == dtype for part in self._parts), f"{paths} are not of {dtype}"
        self.starts = np.cumsum([0, *(len(part) for part in self._parts)], dtype=np.int64)
        """[shards + 1] number of the first row of each shard, and of all rows."""

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read_parts(self, rows_at_once: int = 1 << 14) -> Iterator[tuple[int, NDArray[T]]]:
        """Yield all rows in order, a bounded number at a time, each time with the number of the first."""
        for start, part in zip(self.starts, self._parts, strict=False):
            for first in range(0, len(part), rows_at_once):
                yield int(start) + first, np.asarray(part[first : first + rows_at_once])

    def rows(self, numbers: NDArray[np.int64]) -> NDArray[T]:
        """[len(numbers), columns] some rows, in the order asked for."""
        order = np.argsort(numbers)  # so that each shard's are together, and are read in the order of the file
        cuts = np.searchsorted(numbers[order], self.starts)
        first = self._parts[0]
        found = np.empty((len(numbers), *first.shape[1:]), dtype=first.dtype)
        for shard in np.flatnonzero(np.diff(cuts)):
            some = order[cuts[shard] : cuts[shard + 1]]
            found[some] = self._parts[shard][numbers[some] - self.starts[shard]]
        return found


def _map(path: Path) -> NDArray[Any]:
    try:
        rows: NDArray[Any] = np.load(path, mmap_mode="r")
    except ValueError:  # nothing can be mapped of an array without rows
        rows = np.load(path)
    return rows
