from collections.abc import Buffer, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

class IndexWriter:
    """Writes PREFIX.bin and PREFIX.idx; they appear on finish(). Dropped unfinished, it leaves no files."""

    @overload
    def __init__(self, prefix: str, token_bytes: int) -> None: ...
    @overload
    def __init__(self, prefix: str, token_bytes: int, checkpoint: tuple[int, int, int, bool]) -> None:
        """Continue after a checkpoint of an earlier writer; DataFormatError if the .tmp files hold less."""

    def add_document(self, ids: NDArray[np.integer], sequence_lengths: NDArray[np.integer] | None = None) -> None:
        """Append one document, [length]; as one sequence unless `sequence_lengths` cuts it."""

    def add_documents(self, ids: NDArray[np.integer], lengths: NDArray[np.integer]) -> None:
        """Append many documents whose ids follow one another, without the GIL."""

    def checkpoint(self) -> tuple[int, int, int, bool]:
        """Hand all to the kernel: (documents, sequences, tokens, whether each document is one sequence) so far.

        What was written before outlives this process; only `complete` makes it outlive the machine.
        """

    def complete(self) -> None:
        """Complete PREFIX.bin.tmp and PREFIX.idx.tmp, on the disk; renaming them is left to the caller."""

    def suspend(self) -> None:
        """Close the temporary files for a later writer, which continues after the last checkpoint."""

    def finish(self) -> None:
        """Flush both files to the disk and give them their names, the index last."""

    def abort(self) -> None:
        """Remove the temporary files."""

    @property
    def num_documents(self) -> int: ...
    @property
    def num_sequences(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...

class Corpus:
    """A .bin/.idx pair, mapped."""

    def __init__(self, prefix: str, verify: bool = False) -> None: ...
    @property
    def prefix(self) -> str: ...
    @property
    def dtype(self) -> np.dtype[np.integer]: ...
    @property
    def num_sequences(self) -> int: ...
    @property
    def num_documents(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def bin_bytes(self) -> int: ...
    @property
    def idx_bytes(self) -> int: ...
    @property
    def is_contiguous(self) -> bool: ...
    @property
    def sequence_lengths(self) -> NDArray[np.int32]: ...
    @property
    def sequence_pointers(self) -> NDArray[np.int64]: ...
    @property
    def document_indices(self) -> NDArray[np.int64]: ...
    def sequence(self, index: int) -> NDArray[np.integer]:
        """Ids of one sequence, a view of the map."""

    def tokens_before(self, document: int) -> int:
        """Tokens before a document; of all of them, for num_documents. Contiguous corpora only."""

    def id_range(self) -> tuple[int, int]:
        """Smallest and largest id; (0, -1) for an empty corpus. Reads the whole .bin, without the GIL."""

class Permutation:
    """A keyed bijection of [0, size)."""

    def __init__(self, size: int, key: int) -> None: ...
    def __call__(self, index: int) -> int: ...

class TokenStream:
    """The order in which a range of documents is read."""

    def __init__(
        self, corpus: Corpus, first_document: int, end_document: int, seq_length: int, key: int, shuffle: bool
    ) -> None: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_samples(self) -> int:
        """Samples that begin in the first epoch, or of the single pass where it isn't shuffled."""

    def epoch_of(self, sample: int) -> int: ...

class Blend:
    """Global sample number -> (set, sample of the set)."""

    def __init__(self, weights: Sequence[int]) -> None: ...
    @property
    def block_size(self) -> int: ...
    def picks(self, begin: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sets and samples of the numbers [begin, begin + count)."""

    def counts(self, n: int) -> NDArray[np.int64]:
        """Samples taken from each set before number n, [num_sets]."""

class CappedBlend:
    """A blend whose sets may run out."""

    def __init__(self, weights: Sequence[int], limits: Sequence[int | None]) -> None: ...
    @property
    def num_samples(self) -> int | None:
        """Samples until all sets have run out; None where one never does."""

    def picks(self, begin: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sets and samples of the numbers [begin, begin + count)."""

    def counts(self, n: int) -> NDArray[np.int64]:
        """Samples taken from each set before number n, [num_sets]."""

    def number_of(self, set_index: int, sample: int) -> int:
        """The number of a set's sample."""

class FillInTheMiddle:
    """How documents are permuted."""

    def __init__(
        self,
        *,
        rate: float,
        spm_rate: float,
        prefix_id: int,
        middle_id: int,
        suffix_id: int,
        eod_id: int | None = None,
        key: int = 0,
    ) -> None: ...

def pack_best_fit(
    lengths: NDArray[np.int64], capacity: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(row_begin, document, offset, length) of documents packed into rows of `capacity` tokens, without the GIL."""

class Batcher:
    """Assembles microbatches."""

    def __init__(
        self,
        streams: Sequence[TokenStream],
        weights: Sequence[int] | None = None,
        limits: Sequence[int | None] | None = None,
        *,
        seq_length: int,
        vocab_size: int = 0,
        masked_eod: int | None = None,
        document_boundaries: bool = False,
        reset_position_ids: bool = False,
        fill_in_the_middle: FillInTheMiddle | None = None,
        first_sample: int = 0,
        consumed: Sequence[int] = (),
        reads_per_window: int = 1,
    ) -> None:
        """The numbers begin at `first_sample`; of each stream `consumed` samples, if given, were taken before."""

    def assemble(
        self, indices: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32], NDArray[np.int64], NDArray[np.int32] | None]:
        """(tokens, labels, loss_mask, position_ids) of these samples, each [b, s], and cu_seqlens, without the GIL."""

    def locate(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(sets, samples) of these global samples."""

def count_lines(data: Buffer) -> int:
    """Ends of lines in bytes, counted without the GIL."""

def parse_jsonl(
    data: Buffer, keys: Sequence[str]
) -> tuple[list[list[str]], list[int], list[tuple[int, int, int, int]]]:
    """Texts of the records that are plainly well formed: `texts[key][record]`, the line of each record, and doubts.

    A doubt is a line to be given to a general parser: (records before it, its number, its begin, its end). Lines are
    counted from 0. Scans without the GIL.
    """

def frame_documents(
    ids: NDArray[np.uint32], lengths: NDArray[np.int64], token_bytes: int, bos: int | None, eod: int | None
) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
    """Narrow ids to uint16 or int32, with bos before and eod after every document that has any."""

def find_unknown(text: str, known: NDArray[np.bool_]) -> list[int]:
    """Where the characters from U+0080 on that are False in `known` [0x110000] are; the first of each."""
