"""How probable the model that a run starts from finds each reply: computed once, and kept beside the corpus.

`PREFIX.reference-HASH.npy` is a NumPy array, FP32 [records, 2], NaN for records that no row of the run holds. While it
is being computed, it is `PREFIX.reference-HASH.partial`, with NaN for what is still to be done.
"""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_7b.errors import DataFormatError
from megatron_7b.files import flush_to_disk

PARTS = 2
"""Replies of a record."""
_DTYPE = np.dtype("<f4")


class ReferenceFile:
    """The file of one corpus and one start.

    Args:
        prefix: Of the corpus.
        identity: Hash of all that decides the values beside the corpus.
        num_records: Of the corpus.
    """

    def __init__(self, prefix: str | Path, identity: str, num_records: int) -> None:
        self.path = Path(f"{prefix}.reference-{identity}.npy")
        self._partial = self.path.with_suffix(".partial")
        self._shape = (num_records, PARTS)

    def open_partial(self) -> NDArray[np.float32]:
        """Return what has been computed so far, NaN elsewhere; what is written into it survives a kill."""
        size = self._shape[0] * PARTS * _DTYPE.itemsize
        if not self._partial.is_file() or self._partial.stat().st_size != size:
            np.full(self._shape, np.nan, _DTYPE).tofile(self._partial)
        return np.memmap(self._partial, _DTYPE, "r+", shape=self._shape)

    def complete(self, values: NDArray[np.float32]) -> None:
        """Give the file its final name, now that all values are there."""
        beside = self.path.with_suffix(".npy.tmp")
        with beside.open("wb") as stream:
            np.save(stream, np.asarray(values))
        flush_to_disk(beside)
        os.replace(beside, self.path)
        flush_to_disk(self.path.parent)
        self._partial.unlink(missing_ok=True)

    def read(self) -> NDArray[np.float32]:
        """Return the values, [records, 2].

        Raises:
            DataFormatError: The file is damaged, or not of this corpus.
        """
        try:
            values: NDArray[np.float32] = np.load(self.path, allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise DataFormatError(f"{self.path} cannot be read: {error}", hint="remove it; it is made again") from error
        if values.shape != self._shape or values.dtype != _DTYPE:
            raise DataFormatError(
                f"{self.path} has values of {values.shape}, expected {self._shape}", hint="remove it; it is made again"
            )
        return values
