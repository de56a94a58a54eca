"""What a run is asked for, what it did, and the checks that come before its first byte."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_7b import __version__
from megatron_7b.data.corpus.manifest import TokenizerFacts
from megatron_7b.data.corpus.manifest_reader import load_manifest
from megatron_7b.data.corpus.publish import PUBLISHED, find_existing, get_suffixed, remove_temporary
from megatron_7b.data.preprocess.journal import Journal, hash_job
from megatron_7b.data.preprocess.shards import Shard
from megatron_7b.data.reading.blocks import TextDocuments
from megatron_7b.data.reading.records import BadRecord
from megatron_7b.data.reading.sources import Source
from megatron_7b.errors import ConfigError, DataFormatError
from megatron_7b.runtime.output_paths import check_folder_to_write


@dataclass(frozen=True, kw_only=True)
class PreprocessJob:
    """One run, whatever the tokenizer library."""

    output_prefix: str
    tokenizer: TokenizerFacts
    keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    prepend_bos: bool = False
    level: Literal["document", "sentence"] = "document"
    """What one sequence is; sentences need `split_sentences`."""
    split_sentences: Callable[[str], list[str]] | None = None
    sentence_model: str | None = None
    """Where `split_sentences` comes from, in words."""
    text_documents: TextDocuments = "file"
    shard: Shard | None = None
    """Which part of the input this is; None for all of it."""
    inputs_hash: str | None = None
    """Of all inputs, if this is a shard of them; see `shards.hash_inputs`."""
    num_workers: int = 1
    strict: bool = False
    overwrite: bool = False
    block_bytes: int = 1 << 20
    engine: str = "auto"
    verify: str = "sample"
    sample_characters: int = 1 << 18
    """How much of the corpus a fast engine is compared on, spread evenly."""
    command: Sequence[str] = ()

    def report(self, outcome: "Outcome") -> "PreprocessReport":
        """Return an empty report on this job."""
        return PreprocessReport(outcome=outcome, prefixes=self.get_output_prefixes())

    def get_output_prefixes(self) -> list[str]:
        """Return one corpus per key."""
        shard = "" if self.shard is None else self.shard.suffix
        return [f"{self.output_prefix}{shard}_{key}_{self.level}" for key in self.keys]

    def get_journal_path(self) -> Path:
        """Beside the first corpus."""
        return get_suffixed(self.get_output_prefixes()[0], ".journal")

    def describe(self, sources: Sequence[Source]) -> dict[str, Any]:
        """Return all that decides what is written, for the journal: a run continues only if all of it is the same."""
        return {
            "inputs": [
                {
                    "path": str(source.path.absolute()),
                    "size": source.size,
                    "modified_ns": source.modified_ns,
                    "span": source.span,
                }
                for source in sources
            ],
            "tokenizer": self.tokenizer.identity,
            "--json-keys": " ".join(self.keys),
            "--append-eod": self.append_eod,
            "--prepend-bos": self.prepend_bos,
            "--split-sentences": self.sentence_model,
            "--text-documents": self.text_documents,
            "--shard": None if self.shard is None else str(self.shard),
            "--strict": self.strict,
            "--engine": self.engine,
            "--verify": self.verify,
            "--verify-sample-mb": self.sample_characters / 1e6,
            "block size": self.block_bytes,
            "version": __version__,
        }


Outcome = Literal["written", "published", "found"]
"""Whether a run has written its corpora, has given those of a killed run their names, or has found them complete."""


@dataclass
class PreprocessReport:
    """What a run did."""

    outcome: Outcome = "written"
    engine: str = ""
    """What has encoded."""
    input_bytes: int = 0
    """As they are on disk, compressed or not."""
    documents: int = 0
    tokens: int = 0
    empty_documents: int = 0
    num_bad: int = 0
    first_bad: list[BadRecord] = field(default_factory=list)
    num_differences: int = 0
    compared_texts: int = 0
    compared_characters: int = 0
    prefixes: list[str] = field(default_factory=list)
    continued_at: int = 0
    """Documents that an earlier, killed run had written."""


def check_job(job: PreprocessJob, sources: Sequence[Source]) -> None:
    """Refuse all about a job that can be known to be wrong before the first byte is read.

    Raises:
        ConfigError: All problems at once.
    """
    problems = []
    if job.append_eod and job.tokenizer.eod_id is None:
        problems.append(
            "--append-eod: the tokenizer has no end-of-document token "
            "(tokenizer_config.json must name an eos_token that tokenizer.json has)"
        )
    if job.prepend_bos and job.tokenizer.bos_id is None:
        problems.append("--prepend-bos: the tokenizer has no bos_token")
    if len(set(job.keys)) != len(job.keys):
        problems.append(f"--json-keys names a key twice: {' '.join(job.keys)}")
    problems += [
        f"--json-keys {key!r}: the output is named after the key, and a file cannot have this name"
        for key in job.keys
        if not key or "/" in key
    ]
    if len(job.keys) > 1 and any(source.format == ".txt" for source in sources):
        problems.append(f"plain text has one text per document, so --json-keys {' '.join(job.keys)} cannot be filled")
    inputs = {source.path.resolve() for source in sources}
    files = [get_suffixed(prefix, suffix) for prefix in job.get_output_prefixes() for suffix in PUBLISHED]
    problems += [f"output {file} is also an input" for file in files if file.resolve() in inputs]
    if not job.get_journal_path().exists() and (existing := _find_obstacle(job, sources)):
        problems.append(existing)
    folder = Path(job.output_prefix).parent
    check_folder_to_write(folder, "the output folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        problems.append(f"output folder {folder} cannot be written: {error.strerror}")
    if problems:
        raise ConfigError("\n".join(problems))


def open_journal(job: PreprocessJob, sources: Sequence[Source]) -> Journal:
    """Return the journal of a job, which knows what a killed run of it has done.

    Raises:
        ConfigError: It is that of another job, another process holds it, or the output exists besides.
    """
    journal = Journal(job.get_journal_path(), job.describe(sources))
    try:
        differences = journal.find_differences()
        if differences and not job.overwrite:
            raise ConfigError(
                f"an unfinished run of another command is at {journal.path}:\n  " + "\n  ".join(differences),
                hint="that command continues it; --overwrite discards it",
            )
        if differences:
            discard_remains(job, journal)
        if not journal.is_complete and (existing := _find_obstacle(job, sources)):
            raise ConfigError(existing)
    except BaseException:
        journal.close()
        raise
    return journal


def discard_remains(job: PreprocessJob, journal: Journal) -> None:
    """Remove what a killed run has left."""
    for prefix in job.get_output_prefixes():
        remove_temporary(prefix)
    journal.clear()


def is_done(job: PreprocessJob, sources: Sequence[Source]) -> bool:
    """Return whether this very job has already written its corpora."""
    expected = hash_job(job.describe(sources))
    for prefix in job.get_output_prefixes():
        files = [get_suffixed(prefix, suffix) for suffix in (".bin", ".idx")]
        try:
            manifest = load_manifest(prefix)
            sizes = [file.stat().st_size for file in files]
        except (DataFormatError, OSError):
            return False
        if manifest is None or manifest.job_hash != expected or sizes != [manifest.bin.size, manifest.idx.size]:
            return False
    return True


def _find_obstacle(job: PreprocessJob, sources: Sequence[Source]) -> str | None:
    existing = [file for prefix in job.get_output_prefixes() for file in find_existing(prefix)]
    if not existing or job.overwrite or is_done(job, sources):
        return None
    return f"output exists: {', '.join(map(str, existing))} (--overwrite replaces it)"
