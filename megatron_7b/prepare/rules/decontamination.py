"""Documents that hold text of an evaluation go, so that a score on it measures more than memory.

A document goes if it shares a run of `ngram_words` words with an evaluation text, whatever the case, spacing and
punctuation; or all words of one that is shorter, down to `min_words`: fewer words meet by chance. Of a script without
spaces, where each character is a word, it takes twice as many.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_7b.data.reading.sources import Source, find_sources
from megatron_7b.errors import DataFormatError
from megatron_7b.prepare.corpus_sections import DecontaminationSection
from megatron_7b.prepare.document import Document, Removed
from megatron_7b.prepare.rules.words import is_unspaced, split_words
from megatron_7b.prepare.shingles import Words, hash_runs, hash_words

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class EvaluationText:
    """One text of an evaluation, and where it is written."""

    text: str
    source: str
    position: int
    """Line, row or paragraph's first line, from 1."""

    @property
    def place(self) -> tuple[str, int]:
        """Names the record that it is of."""
        return self.source, self.position


class Decontamination:
    """Removes documents that share a run of words with the evaluation files.

    Making one reads the files: a second for 20 MB.

    Args:
        section: The files, and how long a run must be.

    Raises:
        DataFormatError: A file is missing, damaged, or has no text that is long enough.
    """

    name = "decontamination"

    def __init__(self, section: DecontaminationSection) -> None:
        self._texts = [text for source in find_sources(section.files) for text in read_evaluation(source, section.keys)]
        self._beginnings, self._runs, is_covered = _index_runs(self._texts, section)
        covered = {self._texts[number].place for number in np.flatnonzero(is_covered)}
        self.uncovered = len({text.place for text in self._texts} - covered)
        """Records of the evaluation files that have no text which is long enough to be looked for."""
        self._min_words = section.min_words
        if section.files and not self._runs:
            raise DataFormatError(
                f"no text of {', '.join(section.files)} has {section.min_words} words or more: nothing to look for",
                hint="decontamination.keys names the keys that hold text; decontamination.min_words says what is long",
            )

    def __call__(self, document: Document) -> Document | Removed:
        """Return the document, or with which evaluation text it shares which words."""
        if not self._runs:
            return document
        words = hash_words([document.text])
        if not _find(self._beginnings, hash_runs(words, self._min_words))[0].size:  # so with nearly all documents
            return document
        for size, (hashes, owners) in self._runs.items():
            at, found = _find(hashes, hash_runs(words, size))
            if at.size:
                owner = self._texts[owners[found[0]]]
                shared = _cut(document.text, words, int(at[0]), size)
                return Removed("decontamination", f"shares “{shared}” with {owner.source}:{owner.position}")
        return document


def check_decontamination(section: DecontaminationSection) -> None:
    """Refuse before anything is written evaluation files that are not there, or that hold nothing to look for.

    Raises:
        DataFormatError: As for `Decontamination`.
    """
    step = Decontamination(section)
    if step.uncovered:
        logger.warning(
            "decontamination: %d records of %s have no text of %d words, and are not looked for",
            step.uncovered,
            ", ".join(section.files),
            section.min_words,
        )


def read_evaluation(source: Source, keys: Sequence[str]) -> Iterator[EvaluationText]:
    """Yield the texts of one evaluation file: JSONL, parquet or plain text (a paragraph each).

    Args:
        source: The file.
        keys: Keys whose strings are taken; empty takes every string of a record. Lists and objects are looked into.

    Raises:
        DataFormatError: A record that cannot be read: what it holds could not be kept out. Or one without the keys.
    """
    for position, value in _read_records(source):
        if isinstance(value, dict) and keys and not any(key in value for key in keys):
            raise DataFormatError(
                f"{source.path}:{position} has none of the keys {', '.join(keys)}; its keys: {', '.join(value)}",
                hint="decontamination.keys names the keys that hold text; without it, all strings are taken",
            )
        for text in _strings(value, keys):
            yield EvaluationText(text, str(source.path), position)


def _read_records(source: Source) -> Iterator[tuple[int, Any]]:
    import orjson

    from megatron_7b.data.reading.records import parse_block

    if source.format == ".parquet":
        yield from _read_rows(source)
        return
    for block in source.read_blocks([], "paragraph", _BLOCK_BYTES):
        if block.kind != "jsonl":
            parsed = parse_block(block, ["text"])
            if parsed.bad:
                raise DataFormatError(str(parsed.bad[0]))
            yield from zip(parsed.numbers, parsed.texts[0], strict=True)
            continue
        for position, line in enumerate(bytes(block.data).split(b"\n"), start=block.first_record):
            if line and not line.isspace():
                try:
                    yield position, orjson.loads(line)
                except ValueError as error:
                    raise DataFormatError(f"{source.path}:{position} is not JSON: {error}") from error


def _read_rows(source: Source) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(source.path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            yield from enumerate(rows, start=1)
    except (pa.ArrowException, OSError) as error:
        raise DataFormatError(f"{source.path} is not a readable parquet file: {error}") from error


def _strings(value: Any, keys: Sequence[str]) -> Iterator[str]:
    """Yield every string in a value; of an object at the top, only under the keys, if there are any."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if not keys or key in keys:
                yield from _strings(inner, ())
    elif isinstance(value, Iterable):
        for inner in value:
            yield from _strings(inner, ())


def _index_runs(
    texts: Sequence[EvaluationText], section: DecontaminationSection
) -> tuple[NDArray[np.uint64], dict[int, tuple[NDArray[np.uint64], NDArray[np.int64]]], NDArray[np.bool_]]:
    """Return the runs of words to look for.

    Returns:
        Sorted hashes of the first `min_words` words of every run; and by the number of words of a run, sorted hashes
        and for each the number of a text that has it; and [texts] whether a text has any.
    """
    words = hash_words([text.text for text in texts])
    lengths = np.diff(words.firsts)
    factors = np.array([1 + is_unspaced(text.text, len(split_words(text.text))) for text in texts], np.int64)
    longest, least = factors * section.ngram_words, factors * section.min_words
    shortest = hash_runs(words, section.min_words)
    beginnings = [np.empty(0, dtype=np.uint64)]
    runs = {}
    for size in range(section.min_words, 2 * section.ngram_words + 1):
        is_wanted = (size >= least) & (np.minimum(lengths, longest) == size)
        counts = np.where(is_wanted, lengths - size + 1, 0)
        if not counts.any():
            continue
        owners = np.repeat(np.arange(len(texts)), counts)
        begins = np.arange(counts.sum()) + np.repeat(words.firsts[:-1] - (np.cumsum(counts) - counts), counts)
        hashes, firsts = np.unique(hash_runs(words, size)[begins], return_index=True)
        runs[size] = hashes, owners[firsts]
        beginnings.append(shortest[begins])
    return np.unique(np.concatenate(beginnings)), runs, lengths >= least


def _find(hashes: NDArray[np.uint64], wanted: NDArray[np.uint64]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return which of `wanted` are among sorted hashes, and where there."""
    places = np.minimum(np.searchsorted(hashes, wanted), len(hashes) - 1)
    at = np.flatnonzero(hashes[places] == wanted)
    return at, places[at]


def _cut(text: str, words: Words, first: int, size: int) -> str:
    """Return the words of a run, as the hashes see them (in lower case)."""
    data = text.lower().encode(errors="surrogatepass")
    return data[words.starts[first] : words.ends[first + size - 1]].decode(errors="replace")
