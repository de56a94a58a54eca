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
    """Evaluation files; empty does nothing."""


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
