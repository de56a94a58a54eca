"""Read, parse, encode, write: overlapped on all cores, in input order, in bounded memory.

The main thread reads blocks and writes results; `num_workers` threads parse and encode in between, which is enough
because decompression, hashing, encoding and writing all release the GIL. At most a few blocks per worker are under way.
"""

import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from megatron_7b import __version__
from megatron_7b.data.preprocess.encoding import BatchEncoder, EncodedBlock, EncodingOptions, encode_block
from megatron_7b.data.preprocess.manifest import EngineFacts, Manifest, TokenizerFacts
from megatron_7b.data.preprocess.output import CorpusOutput, choose_token_dtype, get_suffixed
from megatron_7b.data.preprocess.records import BadRecord
from megatron_7b.data.preprocess.sources import Block, Source, TextDocuments
from megatron_7b.errors import ConfigError, DataFormatError

NUM_BAD_KEPT = 10
"""So many bad records and differences are kept in words; the rest is counted."""
_BLOCKS_PER_WORKER = 3
_EXCERPT_CHARACTERS = 2048


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
    text_documents: TextDocuments = "file"
    num_workers: int = 1
    strict: bool = False
    overwrite: bool = False
    block_bytes: int = 1 << 20
    sample_characters: int = 1 << 18
    """How much of the corpus a fast engine is compared on, spread evenly."""
    command: Sequence[str] = ()

    def get_output_prefixes(self) -> list[str]:
        """One corpus per key."""
        return [f"{self.output_prefix}_{key}_{self.level}" for key in self.keys]


class Progress(Protocol):
    """Told after every block."""

    def update(self, bytes_read: int, documents: int, tokens: int) -> None:
        """Totals so far; bytes as they lie on disk."""

    def warn(self, message: str) -> None:
        """Something that the user should read while the run goes on."""


@dataclass
class PreprocessReport:
    """What a run did."""

    documents: int = 0
    tokens: int = 0
    empty_documents: int = 0
    num_bad: int = 0
    first_bad: list[BadRecord] = field(default_factory=list)
    num_differences: int = 0
    prefixes: list[str] = field(default_factory=list)


def check_job(job: PreprocessJob, sources: Sequence[Source]) -> None:
    """Everything that can be known before the first byte is read.

    Raises:
        ConfigError: All problems at once.
    """
    problems = []
    if job.append_eod and job.tokenizer.eod_id is None:
        problems.append("--append-eod: the tokenizer has no end-of-document token (eos_token in tokenizer_config.json)")
    if job.prepend_bos and job.tokenizer.bos_id is None:
        problems.append("--prepend-bos: the tokenizer has no bos_token")
    if len(set(job.keys)) != len(job.keys):
        problems.append(f"--json-keys names a key twice: {' '.join(job.keys)}")
    if len(job.keys) > 1 and any(source.format == ".txt" for source in sources):
        problems.append(f"plain text has one text per document, so --json-keys {' '.join(job.keys)} cannot be filled")
    problems += _find_output_problems(job, sources)
    if problems:
        raise ConfigError("\n".join(problems))


def _find_output_problems(job: PreprocessJob, sources: Sequence[Source]) -> list[str]:
    problems = []
    inputs = {source.path.resolve() for source in sources}
    for prefix in job.get_output_prefixes():
        files = [get_suffixed(prefix, suffix) for suffix in (".bin", ".idx", ".json")]
        existing = [str(file) for file in files if file.exists()]
        if existing and not job.overwrite:
            problems.append(f"output exists: {', '.join(existing)} (--overwrite replaces it)")
        problems += [f"output {file} is also an input" for file in files if file.resolve() in inputs]
    folder = Path(job.output_prefix).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        problems.append(f"output folder {folder} cannot be written: {error.strerror}")
    return problems


def run_preprocess(
    job: PreprocessJob, sources: Sequence[Source], encoder: BatchEncoder, progress: Progress
) -> PreprocessReport:
    """Preprocess all sources into one corpus per key; nothing is published unless all of it succeeds.

    Raises:
        DataFormatError: A source is damaged as a whole, no document came out, or a record is bad and the job strict.
    """
    outputs: list[CorpusOutput] = []
    try:
        for prefix in job.get_output_prefixes():
            outputs.append(CorpusOutput(prefix, job.tokenizer.vocab_size))  # noqa: PERF401  # to abort those opened
        report = _Run(job, sources, encoder, progress, outputs).execute()
    except BaseException:
        for output in outputs:
            output.abort()
        raise
    return report


class _Run:
    def __init__(
        self,
        job: PreprocessJob,
        sources: Sequence[Source],
        encoder: BatchEncoder,
        progress: Progress,
        outputs: Sequence[CorpusOutput],
    ) -> None:
        self._job, self._sources, self._encoder = job, sources, encoder
        self._progress, self._outputs = progress, outputs
        self._report = PreprocessReport(prefixes=[output.prefix for output in outputs])
        self._options = EncodingOptions(
            keys=job.keys,
            dtype=choose_token_dtype(job.tokenizer.vocab_size),
            eod_id=job.tokenizer.eod_id if job.append_eod else None,
            bos_id=job.tokenizer.bos_id if job.prepend_bos else None,
            split_sentences=job.split_sentences,
        )

    def execute(self) -> PreprocessReport:
        """All blocks through the workers, results written in order, then published."""
        # With each block how far reading had come: progress is what has been written, not what was read ahead.
        pending: deque[tuple[Future[EncodedBlock], int]] = deque()
        limit = _BLOCKS_PER_WORKER * self._job.num_workers
        with ThreadPoolExecutor(self._job.num_workers, "encode") as pool:
            try:
                for block, sample in self._plan_samples(self._read_all()):
                    future = pool.submit(encode_block, block, self._encoder, self._options, sample)
                    pending.append((future, sum(source.bytes_read for source in self._sources)))
                    while pending and (pending[0][0].done() or len(pending) > limit):
                        self._write(*pending.popleft())
                while pending:
                    self._write(*pending.popleft())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        self._check_result()
        self._publish()
        return self._report

    def _read_all(self) -> Iterator[Block]:
        for source in self._sources:
            yield from source.read_blocks(self._job.keys, self._job.text_documents, self._job.block_bytes)

    def _plan_samples(self, blocks: Iterator[Block]) -> Iterator[tuple[Block, int]]:
        """Give every block its share of the sample, in excerpts: the share of small blocks is saved up."""
        total = max(1, sum(source.size for source in self._sources))
        owed = float(_EXCERPT_CHARACTERS)  # the first block is always sampled
        for block in blocks:
            size = len(block.data) or self._job.block_bytes
            owed += self._job.sample_characters * size / total
            sample = int(owed) if owed >= _EXCERPT_CHARACTERS else 0
            owed -= sample
            yield block, sample

    def _write(self, encoding: Future[EncodedBlock], bytes_read: int) -> None:
        report, block = self._report, encoding.result()
        for bad in block.bad:
            if self._job.strict:
                raise DataFormatError(f"{bad}", hint="without --strict such records are counted and left out")
            if len(report.first_bad) < NUM_BAD_KEPT:
                report.first_bad.append(bad)
                self._progress.warn(f"left out {bad}")
        for difference in block.differences[: max(0, NUM_BAD_KEPT - report.num_differences)]:
            self._progress.warn(f"{self._encoder.name} differs from the reference, whose ids are taken: {difference}")
        for output, texts in zip(self._outputs, block.per_key, strict=True):
            output.add(texts.ids, texts.lengths, texts.sentence_lengths)
        report.num_bad += len(block.bad)
        report.num_differences += len(block.differences)
        report.documents += block.num_records
        report.tokens = sum(output.num_tokens for output in self._outputs)
        self._progress.update(bytes_read, report.documents, report.tokens)

    def _check_result(self) -> None:
        for output in self._outputs:
            if output.num_tokens == 0:
                first = "\n".join(f"  {bad}" for bad in self._report.first_bad)
                raise DataFormatError(
                    f"no token for {output.prefix}: {self._report.documents} documents, all empty, and "
                    f"{self._report.num_bad} records left out" + (f", the first:\n{first}" if first else ""),
                    hint="check --json-keys and that the input is one JSON object per line",
                )

    def _publish(self) -> None:
        for output in self._outputs:
            path = get_suffixed(output.prefix, ".json")
            counts, bin_facts, idx_facts = output.finish(path)
            self._report.empty_documents += counts.empty_documents
            Manifest(
                tokenizer=self._job.tokenizer,
                counts=replace(counts, bad_records=self._report.num_bad),
                token_bytes=output.dtype.itemsize,
                bin=bin_facts,
                idx=idx_facts,
                options=self._describe_options(),
                engine=self._describe_engine(),
                sources=[source.to_record() for source in self._sources],
                bad_records=[str(bad) for bad in self._report.first_bad],
                command=list(self._job.command),
                version=__version__,
            ).save(path)

    def _describe_options(self) -> dict[str, Any]:
        job = self._job
        return {
            "keys": list(job.keys),
            "level": job.level,
            "append_eod": job.append_eod,
            "prepend_bos": job.prepend_bos,
            "text_documents": job.text_documents,
        }

    def _describe_engine(self) -> EngineFacts:
        return EngineFacts(
            name=self._encoder.name,
            checked_texts=getattr(self._encoder, "checked_texts", 0),
            checked_characters=getattr(self._encoder, "checked_characters", 0),
            replaced_documents=self._report.num_differences,
        )
