"""One corpus on its way to disk: `PREFIX.bin.tmp`, `PREFIX.idx.tmp`, and what the manifest must know of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatron_7b.data._index import IndexWriter
from megatron_7b.data.corpus.fingerprint import spot_hash
from megatron_7b.data.corpus.manifest import Counts, FileFacts
from megatron_7b.data.corpus.publish import get_suffixed, remove_temporary
from megatron_7b.errors import DataFormatError

type TokenIds = NDArray[np.integer[Any]]
"""uint16 or int32, see `token_bytes_for`."""
type TokenDtype = np.dtype[np.integer[Any]]

_HEADER_BYTES = 34
_LENGTH_BYTES = 4


@dataclass(kw_only=True)
class OutputState:
    """What a corpus holds at a checkpoint; enough to continue from, and to see whether its files still hold it."""

    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    bounds_implied: bool = True
    """Whether every document so far is exactly one sequence."""
    empty: int = 0
    min_id: int | None = None
    max_id: int | None = None
    bin_hash: str = ""
    """xxh3_128 of the ids."""
    lengths_hash: str = ""
    """xxh3_128 of the sequences' lengths."""


class CorpusOutput:
    """Appends encoded documents. Nothing is visible under the final names before `publish`."""

    def __init__(self, prefix: str, dtype: TokenDtype, vocab_size: int) -> None:
        self.prefix = prefix
        self._dtype = dtype
        self._vocab_size = vocab_size
        self._state = OutputState()
        self._bin_hash, self._lengths_hash = xxhash.xxh3_128(), xxhash.xxh3_128()
        self._writer = IndexWriter(prefix, dtype.itemsize)

    @classmethod
    def resume(cls, prefix: str, dtype: TokenDtype, vocab_size: int, found: "Remains", checkpoint: int) -> Self:
        """Continue after a checkpoint; what was written after it is cut off.

        Args:
            prefix: Of the corpus.
            dtype: Of its ids.
            vocab_size: Of its tokenizer.
            found: What `examine` said of its files.
            checkpoint: Which of the states given there.
        """
        output = cls.__new__(cls)
        output.prefix, output._dtype, output._vocab_size = prefix, dtype, vocab_size
        output._state = state = found.states[checkpoint]
        output._bin_hash, output._lengths_hash = found.hashes[checkpoint]
        at = (state.documents, state.sequences, state.tokens, state.bounds_implied)
        output._writer = IndexWriter(prefix, dtype.itemsize, at)
        return output

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""
        return self._state.tokens

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
                self._lengths_hash.update(lengths_of_one.data)
        elif lengths.all():
            self._add_run(ids, lengths)
        else:
            self._add_with_empty(ids, lengths)

    def checkpoint(self) -> OutputState:
        """Hand all that was added to the kernel, and say what it is."""
        state = self._state
        state.documents, state.sequences, state.tokens, state.bounds_implied = self._writer.checkpoint()
        state.bin_hash, state.lengths_hash = self._bin_hash.hexdigest(), self._lengths_hash.hexdigest()
        return state

    def complete(self) -> tuple[Counts, FileFacts, FileFacts]:
        """Complete both files under their temporary names, on the disk."""
        state = self._state
        self._writer.complete()
        bin_facts = FileFacts(
            size=state.tokens * self._dtype.itemsize,
            xxh3_128=self._bin_hash.hexdigest(),
            spots=spot_hash(get_suffixed(self.prefix, ".bin.tmp")),
        )
        counts = Counts(
            documents=state.documents,
            sequences=self._writer.num_sequences,
            tokens=state.tokens,
            empty_documents=state.empty,
            bad_records=0,
            min_id=state.min_id,
            max_id=state.max_id,
        )
        return counts, bin_facts, hash_file(get_suffixed(self.prefix, ".idx.tmp"))

    def suspend(self) -> None:
        """Leave the files for a later run."""
        self._writer.suspend()

    def abort(self) -> None:
        """Leave no trace."""
        self._writer.abort()
        remove_temporary(self.prefix)

    def _note(self, ids: TokenIds, lengths: NDArray[np.int64]) -> None:
        state = self._state
        state.documents += len(lengths)
        state.empty += int((lengths == 0).sum())
        state.tokens += len(ids)
        self._bin_hash.update(ids.data)
        if not len(ids):
            return
        low, high = int(ids.min()), int(ids.max())
        state.min_id = low if state.min_id is None else min(state.min_id, low)
        state.max_id = high if state.max_id is None else max(state.max_id, high)
        if high >= self._vocab_size:
            raise DataFormatError(
                f"the tokenizer gave id {high} although its vocabulary has {self._vocab_size} entries"
            )

    def _add_with_empty(self, ids: TokenIds, lengths: NDArray[np.int64]) -> None:
        """Write an empty text as a document without sequences, as Megatron's tool does."""
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
            self._lengths_hash.update(lengths.astype(np.int32).data)


@dataclass(frozen=True)
class Remains:
    """What is left of a corpus: the checkpoints that its files confirm, and the hashes to continue with at each."""

    states: list[OutputState]
    hashes: list[tuple[Any, Any]]


def examine(prefix: str, dtype: TokenDtype, states: Sequence[OutputState]) -> Remains:
    """Read the temporary files, and see how many of these checkpoints, the oldest first, they still hold."""
    remains = Remains([], [])
    bin_hashes = _hash_prefixes(
        get_suffixed(prefix, ".bin.tmp"), 0, [(state.tokens * dtype.itemsize, state.bin_hash) for state in states]
    )
    lengths_hashes = _hash_prefixes(
        get_suffixed(prefix, ".idx.tmp"),
        _HEADER_BYTES,
        [(state.sequences * _LENGTH_BYTES, state.lengths_hash) for state in states],
    )
    for state, *hashes in zip(states, bin_hashes, lengths_hashes, strict=False):
        if not state.bounds_implied and not _has_bounds(prefix, state):
            break
        remains.states.append(state)
        remains.hashes.append((hashes[0], hashes[1]))
    return remains


def hash_file(file: Path) -> FileFacts:
    """Size and xxh3 of a file, read in pieces."""
    digest, size = xxhash.xxh3_128(), 0
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
            size += len(chunk)
    return FileFacts(size=size, xxh3_128=digest.hexdigest(), spots=spot_hash(file))


def _hash_prefixes(file: Path, skipped: int, expected: Sequence[tuple[int, str]]) -> list[Any]:
    """Return the hash objects at each (size, hash) that the file's bytes after `skipped` begin with."""
    digest, done = xxhash.xxh3_128(), 0
    found: list[Any] = []
    if not file.exists():
        return found
    with file.open("rb") as stream:
        stream.seek(skipped)
        for size, wanted in expected:
            while done < size and (chunk := stream.read(min(1 << 20, size - done))):
                digest.update(chunk)
                done += len(chunk)
            if done < size or digest.hexdigest() != wanted:
                break
            found.append(digest.copy())
    return found


def _has_bounds(prefix: str, state: OutputState) -> bool:
    """Return whether the spooled bounds can be those of this state: as many, rising from nothing to all sequences."""
    file = get_suffixed(prefix, ".bounds.tmp")
    count = state.documents + 1
    if not file.exists() or file.stat().st_size < count * 8:
        return False
    bounds = np.memmap(file, np.int64, "r", shape=(count,))
    return bool(bounds[0] == 0 and bounds[-1] == state.sequences and (np.diff(bounds) >= 0).all())


def _split(ids: TokenIds, lengths: NDArray[np.int64]) -> list[TokenIds]:
    return np.split(ids, np.cumsum(lengths)[:-1]) if len(lengths) else []
