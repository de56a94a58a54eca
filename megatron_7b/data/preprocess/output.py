"""One corpus on its way to disk: `PREFIX.bin`, `PREFIX.idx`, and what the manifest must know of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatron_7b.data._index import IndexWriter
from megatron_7b.data.preprocess.manifest import Counts, FileFacts
from megatron_7b.errors import DataFormatError

type TokenIds = NDArray[np.integer[Any]]
"""uint16 or int32, see `choose_token_dtype`."""
type TokenDtype = np.dtype[np.integer[Any]]

# **Source:** megatron.core.datasets.indexed_dataset.DType.optimal_dtype, which keeps some room below 2**16.
_UINT16_VOCAB_LIMIT = 65500


def choose_token_dtype(vocab_size: int) -> TokenDtype:
    """uint16 where every id fits with Megatron's margin, else int32."""
    return np.dtype(np.uint16) if vocab_size < _UINT16_VOCAB_LIMIT else np.dtype(np.int32)


def get_suffixed(prefix: str, suffix: str) -> Path:
    """PREFIX with an ending added; a dot in PREFIX is no ending."""
    return Path(prefix + suffix)


class CorpusOutput:
    """Appends encoded documents; nothing is visible under the final names before `finish`."""

    def __init__(self, prefix: str, vocab_size: int) -> None:
        self.prefix = prefix
        self.dtype = choose_token_dtype(vocab_size)
        self._vocab_size = vocab_size
        self._writer = IndexWriter(prefix, self.dtype.itemsize)
        self._hash = xxhash.xxh3_128()
        self._documents = self._sequences = self._tokens = self._empty = 0
        self._min_id, self._max_id = vocab_size, -1

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""
        return self._tokens

    def add(
        self, ids: TokenIds, lengths: NDArray[np.int64], sentence_lengths: Sequence[NDArray[np.int32]] | None
    ) -> None:
        """Append documents.

        Args:
            ids: Tokens of all documents [total].
            lengths: Tokens of each document [documents].
            sentence_lengths: For each document the lengths of its sentences, or None where a document is one sequence.
        """
        self._note(ids, lengths)
        if sentence_lengths is not None:
            for document, lengths_of_one in zip(_split(ids, lengths), sentence_lengths, strict=True):
                self._writer.add_document(document, lengths_of_one)
            self._sequences += sum(map(len, sentence_lengths))
        elif lengths.all():
            self._writer.add_documents(ids, lengths)
            self._sequences += len(lengths)
        else:
            self._add_with_empty(ids, lengths)

    def finish(self, manifest_path: Path) -> tuple[Counts, FileFacts, FileFacts]:
        """Publish both files; a former manifest goes first, so that none ever stands beside files of another run."""
        manifest_path.unlink(missing_ok=True)
        self._writer.finish()
        bin_facts = FileFacts(size=self._tokens * self.dtype.itemsize, xxh3_128=self._hash.hexdigest())
        seen = self._max_id >= 0
        counts = Counts(
            documents=self._documents,
            sequences=self._sequences,
            tokens=self._tokens,
            empty_documents=self._empty,
            bad_records=0,
            min_id=self._min_id if seen else None,
            max_id=self._max_id if seen else None,
        )
        return counts, bin_facts, hash_file(get_suffixed(self.prefix, ".idx"))

    def abort(self) -> None:
        """Leave no trace."""
        self._writer.abort()

    def _note(self, ids: TokenIds, lengths: NDArray[np.int64]) -> None:
        self._documents += len(lengths)
        self._empty += int((lengths == 0).sum())
        self._tokens += len(ids)
        self._hash.update(ids.data)
        if len(ids):
            self._min_id = min(self._min_id, int(ids.min()))
            self._max_id = max(self._max_id, int(ids.max()))
        if self._max_id >= self._vocab_size:
            raise DataFormatError(
                f"the tokenizer gave id {self._max_id} although its vocabulary has {self._vocab_size} entries"
            )

    def _add_with_empty(self, ids: TokenIds, lengths: NDArray[np.int64]) -> None:
        """An empty text is a document without sequences, as Megatron's tool writes it."""
        nothing = np.empty(0, np.int32)
        start = first = 0
        for empty in np.flatnonzero(lengths == 0):
            self._add_run(ids[start:], lengths[first:empty])
            start += int(lengths[first:empty].sum())
            self._writer.add_document(ids[:0], nothing)
            first = int(empty) + 1
        self._add_run(ids[start:], lengths[first:])

    def _add_run(self, ids: TokenIds, lengths: NDArray[np.int64]) -> None:
        if len(lengths):
            self._writer.add_documents(ids[: int(lengths.sum())], lengths)
            self._sequences += len(lengths)


def hash_file(file: Path) -> FileFacts:
    """Size and xxh3 of a file, read in pieces."""
    digest, size = xxhash.xxh3_128(), 0
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
            size += len(chunk)
    return FileFacts(size=size, xxh3_128=digest.hexdigest())


def _split(ids: TokenIds, lengths: NDArray[np.int64]) -> list[TokenIds]:
    return np.split(ids, np.cumsum(lengths)[:-1]) if len(lengths) else []
