"""Facts about a corpus for people: its statistics, and the tokenizer that its manifest names."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_7b.data.indexed_dataset import IndexedDataset
from megatron_7b.errors import DataFormatError


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


@dataclass(frozen=True)
class ManifestTokenizer:
    """The tokenizer that `PREFIX.json` names."""

    path: Path | None
    """Where it is now: as written, or relative to the manifest; None if it is at neither place."""
    written_path: str
    identity: str | None


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


def manifest_tokenizer(prefix: str) -> ManifestTokenizer | None:
    """The tokenizer named in `PREFIX.json`; None where there is no manifest, or it names none.

    Args:
        prefix: Of an existing corpus, as `resolve_prefix` returns it.

    Raises:
        DataFormatError: The manifest is not a JSON object.
    """
    file = Path(prefix + ".json")
    if not file.is_file():
        return None
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        tokenizer = manifest.get("tokenizer") or {}
        written, identity = tokenizer.get("path"), tokenizer.get("identity")
    except (ValueError, AttributeError) as error:
        raise DataFormatError(
            f"{file} is not a manifest: {error}", hint="remove it, or write the corpus again"
        ) from error
    if not isinstance(written, str):
        return None
    places = (Path(written), file.parent / written)
    return ManifestTokenizer(
        path=next((place for place in places if place.exists()), None),
        written_path=written,
        identity=identity if isinstance(identity, str) else None,
    )
