"""Documents that repeat another one but for a few words: MinHash, bands, and a check of every candidate.

The share of equal columns of two signatures estimates the Jaccard similarity of the documents' shingles. Documents that
agree in a whole band of columns are candidates; one is removed only if its estimated similarity with a document *that
stays* reaches the threshold. So a chain of small changes never removes a document that resembles nothing in the result.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_7b.prepare.corpus_sections import DuplicatesSection
from megatron_7b.prepare.duplicates.signature_files import ROWS_IN_MEMORY, SignatureFiles
from megatron_7b.prepare.extras import import_extra
from megatron_7b.prepare.shingles import hash_shingles

_SEED = 0x5EED
_BATCH_CHARACTERS = 1 << 19
"""Texts hashed together: the arrays of a batch fit the processor's cache."""
_KEYS_READ = 1 << 20
_MISSED_AT_THRESHOLD = 0.01
"""Pairs exactly at the threshold that may agree in no band."""
_NO_SHINGLE = np.uint32(0xFFFFFFFF)


class NearDuplicates:
    """Keeps the first of similar documents, by the words they are made of.

    Signatures and the keys of their bands stay on disk. Memory grows by 9 bytes a document and 8 a similar pair.

    Args:
        section: Threshold, hashes and shingles.
        rows_in_memory: Band keys that are sorted at once.
    """

    name = "near"

    def __init__(self, section: DuplicatesSection, *, rows_in_memory: int = ROWS_IN_MEMORY) -> None:
        self._threshold = section.similarity
        self._num_hashes = section.num_hashes
        self._shingle_words = section.shingle_words
        self._rows_in_memory = rows_in_memory

    def sign(self, texts: Sequence[str]) -> NDArray[np.uint32]:
        """[texts, num_hashes] the least value of each hash function over a text's shingles."""
        minhash = import_extra("rensa", "looking for near duplicates").RMinHash
        signatures = np.empty((len(texts), self._num_hashes), dtype=np.uint32)
        row = 0
        for batch in _batches(texts):
            hashes, offsets = hash_shingles(batch, self._shingle_words)
            matrix = minhash.digest_matrix_from_flat_token_hashes(hashes, offsets, self._num_hashes, _SEED)
            values = itertools.chain.from_iterable(matrix.to_rows())
            block = np.fromiter(values, dtype=np.uint32, count=len(batch) * self._num_hashes)
            signatures[row : row + len(batch)] = block.reshape(len(batch), self._num_hashes)
            row += len(batch)
        return signatures

    def find_keepers(self, signatures: Sequence[Path], present: NDArray[np.bool_], folder: Path) -> NDArray[np.int64]:
        """[documents] the document that stays in place of each, its own number where it stays itself."""
        files = SignatureFiles(signatures, np.uint32)
        keepers = np.arange(len(files), dtype=np.int64)
        if not len(files):
            return keepers
        rows_per_band = choose_rows_per_band(self._threshold, self._num_hashes)
        keys, takes_part = _write_band_keys(files, present, rows_per_band, folder / "band_keys.npy")
        pairs = np.empty(0, dtype=np.int64)
        for band in keys:
            found = [self._compare_within_buckets(files, *part, pairs) for part in self._sort(band, takes_part)]
            pairs = np.unique(np.concatenate([pairs, *itertools.chain.from_iterable(found)]))
        self._decide(files, pairs, keepers)
        return keepers

    def _sort(
        self, band: NDArray[np.uint64], takes_part: NDArray[np.bool_]
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint64]]]:
        """Yield documents with their keys, equal keys together, each group in input order, some at a time."""
        num_passes = -(-len(band) // self._rows_in_memory)
        for which in range(num_passes):
            numbers, keys = [], []
            for first in range(0, len(band), _KEYS_READ):
                read = np.asarray(band[first : first + _KEYS_READ])
                wanted = takes_part[first : first + len(read)] & (read % np.uint64(num_passes) == which)
                numbers.append(first + np.flatnonzero(wanted))
                keys.append(read[wanted])
            together = np.concatenate(keys)
            order = np.argsort(together, kind="stable")
            yield np.concatenate(numbers)[order], together[order]

    def _compare_within_buckets(
        self,
        files: SignatureFiles[np.uint32],
        numbers: NDArray[np.int64],
        keys: NDArray[np.uint64],
        known: NDArray[np.int64],
    ) -> list[NDArray[np.int64]]:
        """Similar documents among those with the same key, each pair as later * documents + earlier.

        Pairs that another band has found (`known`, sorted) are not read from disk again.
        The first of each bucket is compared with the others; those unlike it form a bucket of their own, and again. All
        buckets go a step at once; most are done after one.
        """
        found = []
        while len(keys):
            is_first = np.ones(len(keys), dtype=np.bool_)
            is_first[1:] = keys[1:] != keys[:-1]
            firsts = numbers[is_first][np.cumsum(is_first) - 1]
            others, firsts, keys = numbers[~is_first], firsts[~is_first], keys[~is_first]
            pairs = others * len(files) + firsts
            similar = _are_among(pairs, known)
            similar[~similar] = self._are_similar(files, others[~similar], firsts[~similar])
            found.append(pairs[similar])
            numbers, keys = others[~similar], keys[~similar]
        return found

    def _are_similar(
        self, files: SignatureFiles[np.uint32], some: NDArray[np.int64], others: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        similar = np.empty(len(some), dtype=np.bool_)
        for first in range(0, len(some), 1 << 14):
            part = slice(first, first + (1 << 14))
            equal = np.count_nonzero(files.rows(some[part]) == files.rows(others[part]), axis=1)
            similar[part] = equal >= self._threshold * self._num_hashes
        return similar

    def _decide(self, files: SignatureFiles[np.uint32], pairs: NDArray[np.int64], keepers: NDArray[np.int64]) -> None:
        """In input order: a document goes for a similar one that stays, or that stays for a similar one and is too."""
        for later, group in itertools.groupby(map(int, pairs), key=lambda pair: pair // len(files)):
            earlier = {pair % len(files) for pair in group}
            for keeper in sorted({int(keepers[first]) for first in earlier}):
                if keeper in earlier or self._are_similar(files, np.array([later]), np.array([keeper]))[0]:
                    keepers[later] = keeper
                    break


def check_duplicates(section: DuplicatesSection) -> None:
    """Refuse before anything is written what would fail later.

    Raises:
        ConfigError: Near duplicates are looked for without the library for it.
    """
    if section.near:
        import_extra("rensa", "looking for near duplicates")


def choose_rows_per_band(threshold: float, num_hashes: int) -> int:
    """Return the most columns per band at which nearly all pairs at the threshold still agree in some band.

    Of n hashes in bands of r, two documents of similarity s agree in some band with probability
    1 - (1 - s**r)**(n // r): more columns per band make fewer candidates.
    """
    fitting = [
        rows
        for rows in range(1, num_hashes + 1)
        if (1 - threshold**rows) ** (num_hashes // rows) <= _MISSED_AT_THRESHOLD
    ]
    return max(fitting, default=1)


def _are_among(values: NDArray[np.int64], ordered: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[len(values)] whether each is one of the ordered ones."""
    if not len(ordered):
        return np.zeros(len(values), dtype=np.bool_)
    places = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    among: NDArray[np.bool_] = ordered[places] == values
    return among


def _batches(texts: Sequence[str]) -> list[Sequence[str]]:
    """Consecutive texts of about as many characters."""
    sizes = np.cumsum([len(text) for text in texts]) // _BATCH_CHARACTERS
    cuts = [0, *(np.flatnonzero(np.diff(sizes)) + 1).tolist(), len(texts)]
    return [texts[start:end] for start, end in itertools.pairwise(cuts) if end > start]


def _write_band_keys(
    files: SignatureFiles[np.uint32], present: NDArray[np.bool_], rows_per_band: int, path: Path
) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """Hash every band of every signature into a file, [bands, documents]; also return which documents have shingles."""
    takes_part = present.copy()
    keys: NDArray[np.uint64] | None = None
    for first, rows in files.read_parts():
        num_bands = rows.shape[1] // rows_per_band
        if keys is None:
            keys = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint64, shape=(num_bands, len(files)))
        takes_part[first : first + len(rows)] &= (rows != _NO_SHINGLE).any(axis=1)
        columns = np.ascontiguousarray(rows[:, : num_bands * rows_per_band].T, dtype=np.uint64)
        for band in range(num_bands):
            key = np.zeros(len(rows), dtype=np.uint64)
            for column in columns[band * rows_per_band : (band + 1) * rows_per_band]:
                key = (key ^ column) * np.uint64(0x9E3779B97F4A7C15)
                key ^= key >> np.uint64(29)
            keys[band, first : first + len(rows)] = key
    assert keys is not None
    return keys, takes_part
