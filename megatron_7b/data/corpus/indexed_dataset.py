"""Token corpora on disk: Megatron's MMIDIDX pair, PREFIX.bin and PREFIX.idx."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_7b.data._index import Corpus, IndexWriter
from megatron_7b.errors import DataFormatError, PathError

__all__ = ["IndexWriter", "IndexedDataset", "resolve_prefix", "token_bytes_for"]

UINT16_VOCABULARY_LIMIT = 65500
"""Vocabularies below this are stored as uint16, others as int32.

Source: `DType.optimal_dtype` in megatron.core.datasets.indexed_dataset.
"""

DEFAULT_SUFFIX = "_text_document"
"""What `preprocess` and Megatron's tool append to the output prefix for the JSON key `text`."""


def token_bytes_for(vocab_size: int | None) -> int:
    """Return the bytes per token id in the .bin file, as Megatron chooses them: 2 for uint16, 4 for int32."""
    return 2 if vocab_size is not None and vocab_size < UINT16_VOCABULARY_LIMIT else 4


def token_dtype_for(vocab_size: int | None) -> np.dtype[Any]:
    """Return the type of the ids in the .bin file, as Megatron chooses it."""
    return np.dtype(np.uint16) if token_bytes_for(vocab_size) == 2 else np.dtype(np.int32)


def resolve_prefix(prefix: str | Path) -> str:
    """Return the prefix of an existing .idx file, from what a user typed.

    Accepts the prefix itself, the prefix without `_text_document`, and the name of any of the three files.

    Raises:
        PathError: No such index exists.
    """
    given = str(prefix)
    text = given.rpartition(".")[0] if given.endswith((".bin", ".idx", ".json")) else given
    for candidate in (given, given + DEFAULT_SUFFIX, text, text + DEFAULT_SUFFIX):
        if Path(candidate + ".idx").is_file():
            return candidate
    folder = Path(text) if Path(text).is_dir() else Path(text).parent
    nearby = sorted(folder.glob("*.idx")) if folder.is_dir() else []
    found = ", ".join(str(path)[:-4] for path in nearby[:5])
    raise PathError(
        f"no corpus at {text}: neither {text}.idx nor {text}{DEFAULT_SUFFIX}.idx exists",
        hint=f"corpora in that folder: {found}" if found else "write one with `megatron-7b preprocess`",
    )


class IndexedDataset:
    """The sequences and documents of one corpus, as views of the mapped files: nothing is read before it is used.

    Opening checks the header, the counts against the size of the index, both ends of all tables, the length of the
    .bin, and all entries of up to 65,536 sequences (evenly spread ones of more). `verify` checks all entries.
    """

    def __init__(self, prefix: str | Path, *, verify: bool = False) -> None:
        """Open `PREFIX.bin` and `PREFIX.idx`.

        Args:
            prefix: Path without extension; `_text_document` may be left out.
            verify: Check every entry of the index, in time proportional to its size.

        Raises:
            DataFormatError: A file is missing, truncated, foreign, or does not fit the other one.
        """
        self.corpus = Corpus(resolve_prefix(prefix), verify)

    @property
    def prefix(self) -> str:
        """Path of both files, without extension."""
        return self.corpus.prefix

    @property
    def dtype(self) -> np.dtype[np.integer]:
        """Type of the stored ids."""
        return self.corpus.dtype

    @property
    def num_documents(self) -> int:
        """Documents; each consists of zero or more sequences."""
        return self.corpus.num_documents

    @property
    def num_tokens(self) -> int:
        """Ids in the .bin file."""
        return self.corpus.num_tokens

    @property
    def sequence_lengths(self) -> NDArray[np.int32]:
        """Tokens of each sequence, [num_sequences], a view of the map."""
        return self.corpus.sequence_lengths

    @property
    def document_indices(self) -> NDArray[np.int64]:
        """First sequence of each document, then the number of sequences, [num_documents + 1], a view of the map."""
        return self.corpus.document_indices

    def __len__(self) -> int:
        return self.corpus.num_sequences

    def __getitem__(self, index: int) -> NDArray[np.integer]:
        """Return the ids of one sequence, [length], a read-only view of the map."""
        return self.corpus.sequence(index + len(self) if index < 0 else index)

    def __iter__(self) -> Iterator[NDArray[np.integer]]:
        return (self[index] for index in range(len(self)))

    def document(self, index: int) -> NDArray[np.integer]:
        """Return the ids of one document, [length]: its sequences one after the other.

        Raises:
            IndexError: There is no such document.
            DataFormatError: The index is damaged where opening did not look.
        """
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        begin, end = (int(bound) for bound in self.document_indices[index : index + 2])
        if not 0 <= begin <= end <= len(self):
            raise self._damage(index)
        if end - begin == 1:
            return self[begin]
        return np.concatenate([np.empty(0, self.dtype), *(self[sequence] for sequence in range(begin, end))])

    def tokens(self, begin: int, end: int) -> NDArray[np.integer]:
        """Ids from one token of the .bin to before another, [end - begin], a read-only view of the map."""
        if not 0 <= begin <= end <= self.num_tokens:
            raise IndexError(f"tokens {begin} to {end} of {self.num_tokens}")
        return self._stored[begin:end]

    @cached_property
    def _stored(self) -> NDArray[np.integer]:
        stored = np.memmap(f"{self.prefix}.bin", dtype=self.dtype, mode="r", shape=(self.num_tokens,))
        return stored.view(np.ndarray)

    def document_lengths(self) -> NDArray[np.int64]:
        """Return the tokens of each document, [num_documents]; takes time and memory proportional to the index.

        Raises:
            DataFormatError: The index is damaged where opening did not look.
        """
        bounds, lengths = self.document_indices, self.sequence_lengths
        # Both ends were checked when the corpus was opened: bounds that never fall are between them.
        falling = np.flatnonzero(bounds[1:] < bounds[:-1])
        if len(falling):
            raise self._damage(int(falling[0]))
        if len(lengths) and lengths.min() < 0:
            raise DataFormatError(f"{self.prefix}.idx: sequence {int(lengths.argmin())} has a negative length")
        return np.diff(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[bounds])

    def _damage(self, document: int) -> DataFormatError:
        begin, end = (int(bound) for bound in self.document_indices[document : document + 2])
        return DataFormatError(
            f"{self.prefix}.idx: document {document} has the sequences from {begin} to {end}, of {len(self)}",
            hint="`megatron-7b data verify` names all that is wrong; write the corpus again",
        )
