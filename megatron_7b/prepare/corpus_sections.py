"""Sections of a recipe about the corpus as a whole: what repeats, what leaks, what is rewritten, what is held out."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DuplicatesSection:
    """Which repetitions go; the first document in input order stays."""

    exact: bool = True
    """Documents whose text is the same."""
    near: bool = True
    """Documents that share most of their runs of words (MinHash)."""
    similarity: float = 0.65
    """Estimated Jaccard similarity of the runs of words from which on the later document goes."""
    shingle_words: int = 4
    """Words of a run; a changed word changes so many runs."""
    num_hashes: int = 128
    """Of a document's signature, 4 bytes each; more make the estimate sharper."""


@dataclass(frozen=True, kw_only=True)
class DecontaminationSection:
    """Which documents go because they hold text of an evaluation."""

    files: tuple[str, ...] = ()
    """Evaluation files (JSONL, parquet, plain text); without any, no document is looked at."""
    keys: tuple[str, ...] = ()
    """Keys that hold their texts; without any, every string of a record counts."""
    ngram_words: int = 13
    """A document goes if it shares so many words in a row with an evaluation text."""
    min_words: int = 8
    """A shorter evaluation text counts if it has so many words, and a document holds all of it."""


@dataclass(frozen=True, kw_only=True)
class AugmentationSection:
    """How training documents are rewritten."""

    callable: str | None = None
    """`package.module:name` of a function that rewrites a document; None does nothing."""


@dataclass(frozen=True, kw_only=True)
class SplitSection:
    """What is held out, by a hash of the text: a document never moves when others are added."""

    validation: float = 0.005
    """Share of the documents."""
    test: float = 0.0
    """Share of the documents."""
