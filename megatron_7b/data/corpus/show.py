"""A corpus for people: statistics, and documents as text."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_7b.data.corpus.indexed_dataset import IndexedDataset
from megatron_7b.data.corpus.manifest_reader import load_tokenizer_facts
from megatron_7b.errors import ConfigError
from megatron_7b.tokenizer import Tokenizer, load_tokenizer


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
class ShownDocument:
    """One document.

    Attributes:
        document: Its number.
        tokens: How many it has.
        ids: All of them.
        text: Their text; None if the tokenizer is not known.
    """

    document: int
    tokens: int
    ids: list[int]
    text: str | None


@dataclass(frozen=True)
class ShownCorpus:
    """Statistics of a whole corpus, and some of its documents."""

    statistics: CorpusStatistics
    documents: list[ShownDocument]


def show_corpus(
    prefix: str,
    *,
    first: int = 0,
    num_documents: int = 3,
    tokenizer: Tokenizer | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> ShownCorpus:
    """Read documents of a corpus as text, and measure all of it at the speed of the disk.

    Args:
        prefix: Path of both files, without extension or `_text_document`.
        first: Number of the first document.
        num_documents: How many, as far as there are any.
        tokenizer: What wrote the corpus; None takes the one that its manifest names.
        say: Told why there is no text, or why it may be wrong.

    Raises:
        ConfigError: There is no such document.
        DataFormatError: The corpus is damaged.
    """
    for name, value in (("documents", num_documents), ("first", first)):
        if value < 0:
            raise ConfigError(f"--{name} is {value}, expected 0 or more")
    dataset = IndexedDataset(prefix)
    statistics = corpus_statistics(dataset)
    tokenizer = _find_tokenizer(dataset.prefix, tokenizer, say)
    if tokenizer is not None and statistics.max_id is not None and statistics.max_id >= tokenizer.vocab_size:
        size = f"{tokenizer.vocab_size} tokens of the {tokenizer.kind} tokenizer"
        say(f"the largest id is {statistics.max_id}, beyond the {size}, so ids are shown")
        tokenizer = None
    if first > max(0, dataset.num_documents - 1):
        raise ConfigError(f"--first is {first}, expected 0 to {dataset.num_documents - 1}, the last document")
    documents = []
    for number in range(first, min(dataset.num_documents, first + num_documents)):
        ids = dataset.document(number).tolist()
        documents.append(ShownDocument(number, len(ids), ids, None if tokenizer is None else tokenizer.decode(ids)))
    return ShownCorpus(statistics, documents)


def _find_tokenizer(prefix: str, given: Tokenizer | None, say: Callable[[str], None]) -> Tokenizer | None:
    """Return the given tokenizer, else the manifest's, else None, and say why."""
    named = load_tokenizer_facts(prefix)
    if given is not None:
        tokenizer = given
    elif named is None:
        say(f"no manifest at {prefix}.json names a tokenizer, so ids are shown; --tokenizer DIR shows text")
        return None
    elif named.kind == "bytes":
        tokenizer = load_tokenizer("bytes")
    elif named.path is not None and Path(named.path).exists():
        tokenizer = load_tokenizer(named.path)
    else:
        say(f"the tokenizer {named.path} is not there any more, so ids are shown; --tokenizer DIR shows text")
        return None
    if named is not None and named.identity != tokenizer.identity:
        say("this is not the tokenizer that wrote the corpus (its content differs): the text may be wrong")
    return tokenizer


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
