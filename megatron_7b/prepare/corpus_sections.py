"""Sections of a recipe about the corpus as a whole: what repeats, what leaks, what is rewritten, what is held out."""

from dataclasses import dataclass
from typing import Literal


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
    """Words of a run; a changed word changes this many runs."""
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
    """A document is removed if it shares this many words in a row with an evaluation text."""
    min_words: int = 8
    """A shorter evaluation text counts if it has this many words, and a document holds all of it."""


@dataclass(frozen=True, kw_only=True)
class AugmentationSection:
    """Training documents made from others; each says under `augmentation` how, and from which."""

    method: Literal["none", "rewrite", "back_translation", "concatenation", "callable"] = "none"
    """rewrite and back_translation ask the model of the endpoint, callable your function, concatenation joins."""
    share: float = 1.0
    """Share of the training documents that this is done with, chosen by a hash of the text."""
    keep_original: bool = True
    """False puts what is made in the place of what it was made from."""
    callable: str | None = None
    """package.module:function, which gets a Document and returns a text, or None to make nothing of it."""
    endpoint: str | None = None
    """An OpenAI-compatible server, such as http://localhost:8000/v1."""
    model: str | None = None
    """The model's name there."""
    api_key_variable: str = "OPENAI_API_KEY"
    """Environment variable with the key, if the server wants one."""
    prompt: str = (
        "Rewrite the following text in other words, leaving nothing out. Answer with the text alone.\n\n{text}"
    )
    """For rewrite; {text} stands for the document, {language} for its language."""
    pivot_language: str = "German"
    """For back_translation: into this language and back."""
    language: str = "English"
    """Of documents on which no language is noted."""
    temperature: float = 0.7
    """Of sampling at the endpoint."""
    max_tokens: int | None = None
    """Of an answer; a cut one is not used."""
    concurrency: int = 16
    """Requests under way at once, of each worker."""
    retries: int = 6
    """Tries after the first, with growing pauses, before the run stops."""
    timeout_seconds: float = 300.0
    """For one answer."""
    join_characters: int = 20_000
    """Most characters of joined documents."""


@dataclass(frozen=True, kw_only=True)
class SplitSection:
    """What is held out, by a hash of the text: a document never moves when others are added."""

    validation: float = 0.005
    """Share of the documents."""
    test: float = 0.0
    """Share of the documents."""
