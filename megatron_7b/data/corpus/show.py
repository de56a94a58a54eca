"""Statistics of a corpus, for people."""

from dataclasses import dataclass

import numpy as np

from megatron_7b.data.corpus.indexed_dataset import IndexedDataset


@dataclass(frozen=True)
class CorpusStatistics:
    """What `megatron-7b data show` prints. Lengths are tokens per document, None for a corpus without documents."""

    prefix: str
    documents: int
    sequences: int
    tokens: int
    dtype: str
    min_length: int | None
    median_length: float | None
    max_length: int | None
    empty_documents: int
    min_id: int | None
    max_id: int | None
    bin_bytes: int
    idx_bytes: int


def corpus_statistics(dataset: IndexedDataset) -> CorpusStatistics:
    """Measure a corpus. Reads all of it (the range of ids), at the speed of the disk.

    Raises:
        DataFormatError: The index is damaged where opening did not look.
    """
    lengths = dataset.document_lengths()
    low, high = dataset.corpus.id_range()
    filled = len(lengths) > 0
    return CorpusStatistics(
        prefix=dataset.prefix,
        documents=dataset.num_documents,
        sequences=len(dataset),
        tokens=dataset.num_tokens,
        dtype=str(dataset.dtype),
        min_length=int(lengths.min()) if filled else None,
        median_length=float(np.median(lengths)) if filled else None,
        max_length=int(lengths.max()) if filled else None,
        empty_documents=int(np.count_nonzero(lengths == 0)),
        min_id=low if dataset.num_tokens else None,
        max_id=high if dataset.num_tokens else None,
        bin_bytes=dataset.corpus.bin_bytes,
        idx_bytes=dataset.corpus.idx_bytes,
    )
