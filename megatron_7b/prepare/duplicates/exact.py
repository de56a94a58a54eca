"""Documents with the same text, character for character."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatron_7b.prepare.corpus_sections import DuplicatesSection
from megatron_7b.prepare.duplicates.signature_files import ROWS_IN_MEMORY, SignatureFiles


class ExactDuplicates:
    """Keeps the first of documents with the same 128-bit hash.

    Two different documents among 10 billion share one with a probability of 1.5e-19.
    """

    name = "exact"

    def __init__(self, section: DuplicatesSection, *, rows_in_memory: int = ROWS_IN_MEMORY) -> None:  # noqa: ARG002  # made as NearDuplicates is
        self._rows_in_memory = rows_in_memory

    def sign(self, texts: Sequence[str]) -> NDArray[np.uint64]:
        """[texts, 2] the halves of each text's xxh3."""
        digests = b"".join(xxhash.xxh3_128_digest(text.encode(errors="surrogatepass")) for text in texts)
        return np.frombuffer(digests, dtype=">u8").astype(np.uint64).reshape(-1, 2)

    def find_keepers(self, signatures: Sequence[Path], present: NDArray[np.bool_], folder: Path) -> NDArray[np.int64]:  # noqa: ARG002  # keeps nothing on disk
        """[documents] the first document of the same text, its own number where that is itself."""
        files = SignatureFiles(signatures, np.uint64)
        keepers = np.arange(len(files), dtype=np.int64)
        # Equal hashes have equal remainders, so that each pass sees all of a group.
        num_passes = -(-len(files) // self._rows_in_memory)
        for which in range(num_passes):
            hashes, numbers = _read_pass(files, present, which, num_passes)
            order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: equal ones stay in input order
            hashes, numbers = hashes[order], numbers[order]
            is_first = np.ones(len(numbers), dtype=np.bool_)
            is_first[1:] = (hashes[1:] != hashes[:-1]).any(axis=1)
            keepers[numbers] = numbers[is_first][np.cumsum(is_first) - 1]
        return keepers


def _read_pass(
    files: SignatureFiles[np.uint64], present: NDArray[np.bool_], which: int, num_passes: int
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Hashes and numbers of the present documents whose hash belongs to this pass."""
    hashes, numbers = [np.empty((0, 2), dtype=np.uint64)], [np.empty(0, dtype=np.int64)]
    for first, rows in files.read_parts():
        wanted = present[first : first + len(rows)]
        if num_passes > 1:
            wanted = wanted & (rows[:, 0] % np.uint64(num_passes) == which)
        hashes.append(rows[wanted])
        numbers.append(first + np.flatnonzero(wanted))
    return np.concatenate(hashes), np.concatenate(numbers)
