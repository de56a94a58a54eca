"""Files of text to corpora of tokens: all that `megatron-7b preprocess` does."""

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from megatron_7b.errors import DataFormatError
from megatron_7b.tokenizer import Tokenizer

# Imported as late as possible: a thread builds the fast engine meanwhile.
if TYPE_CHECKING:
    from megatron_7b.data.preprocess.encoding import BatchEncoder
    from megatron_7b.data.preprocess.job import PreprocessJob, PreprocessReport
    from megatron_7b.data.preprocess.journal import Journal
    from megatron_7b.data.preprocess.pipeline import Progress
    from megatron_7b.data.preprocess.shards import Shard
    from megatron_7b.data.reading.blocks import TextDocuments
    from megatron_7b.data.reading.sources import Source
    from megatron_7b.tokenizer.engines import Engine

    type Building = Future[tuple[Engine | None, str]]

logger = logging.getLogger(__name__)

_SMALLEST_SAMPLE_MB = 0.25


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """How text becomes tokens; the command has an option of the same name for each."""

    json_keys: tuple[str, ...] = ("text",)
    """One corpus per key of the records."""
    append_eod: bool = False
    """End each document with the end-of-document token."""
    prepend_bos: bool = False
    """Begin each document with the bos token."""
    text_documents: "TextDocuments" = "file"
    """What one document of a .txt file is."""
    split_sentences: bool = False
    """One sequence per sentence."""
    lang: str = "english"
    """Language of the installed Punkt model, for sentences."""
    shard: "Shard | None" = None
    """Which part of the input to read; None reads all of it."""
    strict: bool = False
    """Stop at the first bad record."""
    engine: Literal["auto", "tokenizers", "fastokens", "gigatoken"] = "auto"
    verify: Literal["sample", "all"] = "sample"
    """What a fast engine is compared on."""
    verify_sample_mb: float | None = None
    """Size of the sample [MB]; None takes a thousandth of the input, at least 0.25."""
    workers: int | None = None
    """Threads; None takes all cores."""
    overwrite: bool = False
    """Replace existing output."""


class OpenProgress(Protocol):
    """From the bytes of the input to a context whose value is told how far it is."""

    def __call__(self, total_bytes: int, /) -> AbstractContextManager["Progress"]:
        """Begin to show progress."""


def preprocess_files(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    tokenizer: Tokenizer,
    options: PreprocessOptions | None = None,
    *,
    command: Sequence[str] = (),
    open_progress: OpenProgress | None = None,
    say: Callable[[str], None] = logger.info,
) -> "PreprocessReport":
    """Tokenize files into `PREFIX_KEY_document.bin`, `.idx` and `.json`, a corpus per key.

    A call that was killed is continued by the same call, with the same bytes as if it had not been killed. A call that
    finds its output complete does nothing.

    Args:
        inputs: Files, globs or folders: JSON lines, parquet or text, compressed or not.
        output_prefix: Path that the names of the output begin with.
        tokenizer: From `load_tokenizer`.
        options: How; None takes the defaults.
        command: For the manifest: what was typed.
        open_progress: Shows how far it is.
        say: Told which engine encodes, and why.

    Returns:
        What was written, or found.

    Raises:
        ConfigError: The options are impossible, or the output exists and is of something else.
        DataFormatError: A file is damaged as a whole, no document came out, or a record is bad and `strict` is set.
    """
    return _Preprocessing(str(output_prefix), tokenizer, options or PreprocessOptions(), open_progress, say).run(
        [str(one) for one in inputs], command
    )


class _Preprocessing:
    def __init__(
        self,
        output_prefix: str,
        tokenizer: Tokenizer,
        options: PreprocessOptions,
        open_progress: OpenProgress | None,
        say: Callable[[str], None],
    ) -> None:
        self._output_prefix, self._tokenizer, self._options, self._say = output_prefix, tokenizer, options, say
        self._open_progress = open_progress or (lambda _: nullcontext(_Silent()))
        self._workers = options.workers or len(os.sched_getaffinity(0))
        self._building = self._start_building()  # takes as long as what is imported meanwhile

    def run(self, inputs: list[str], command: Sequence[str]) -> "PreprocessReport":
        from megatron_7b.data.preprocess.job import check_job, discard_remains, is_done, open_journal
        from megatron_7b.data.preprocess.kept_tokenizer import check_kept_tokenizer, keep_tokenizer
        from megatron_7b.data.preprocess.pipeline import publish_all
        from megatron_7b.data.reading.sources import find_sources

        sources: Sequence[Source] = find_sources(inputs)
        job = self._build_job(sources, command)
        job = self._add_splitter(job, sources)  # all of the input, so that every shard splits alike
        sources = _take_part(sources, job)
        check_job(job, sources)
        check_kept_tokenizer(self._tokenizer, self._output_prefix, overwrite=job.overwrite)
        with open_journal(job, sources) as journal:
            if journal.is_complete:
                publish_all(job, journal)
                return job.report("published")
            if not job.overwrite and is_done(job, sources):
                discard_remains(job, journal)
                return job.report("found")
            keep_tokenizer(self._tokenizer, self._output_prefix)
            return self._encode(job, inputs, sources, journal)

    def _start_building(self) -> "Building":
        """Build the fast engine on a thread of its own."""
        from megatron_7b.tokenizer.engines import build_fast_engine

        pool = ThreadPoolExecutor(1, "build")
        building = pool.submit(build_fast_engine, self._tokenizer, self._options.engine, self._workers)
        pool.shutdown(wait=False)
        return building

    def _build_job(self, sources: "Sequence[Source]", command: Sequence[str]) -> "PreprocessJob":
        from megatron_7b.data.corpus.manifest import describe_tokenizer
        from megatron_7b.data.preprocess.job import PreprocessJob
        from megatron_7b.data.preprocess.shards import hash_inputs

        options = self._options
        sample_mb = options.verify_sample_mb
        if sample_mb is None:
            sample_mb = max(_SMALLEST_SAMPLE_MB, sum(source.size for source in sources) / 1e9)
        return PreprocessJob(
            output_prefix=self._output_prefix,
            tokenizer=describe_tokenizer(self._tokenizer),
            keys=tuple(options.json_keys),
            append_eod=options.append_eod,
            prepend_bos=options.prepend_bos,
            text_documents=options.text_documents,
            shard=options.shard,
            inputs_hash=None if options.shard is None else hash_inputs(sources),
            num_workers=self._workers,
            strict=options.strict,
            overwrite=options.overwrite,
            engine=options.engine,
            verify=options.verify,
            sample_characters=int(sample_mb * 1e6),
            command=command,
            level="sentence" if options.split_sentences else "document",
        )

    def _add_splitter(self, job: "PreprocessJob", sources: "Sequence[Source]") -> "PreprocessJob":
        if not self._options.split_sentences:
            return job
        from megatron_7b.data.preprocess.sentences import build_sentence_splitter

        splitter, origin = build_sentence_splitter(sources, job.keys[0], self._options.lang, job.text_documents)
        self._say(f"sentences: {origin}")
        return replace(job, split_sentences=splitter, sentence_model=origin)

    def _encode(
        self, job: "PreprocessJob", inputs: list[str], sources: "Sequence[Source]", journal: "Journal"
    ) -> "PreprocessReport":
        """Run with the fast engine, and once more with the reference if that is rejected."""
        from megatron_7b.data.preprocess.pipeline import run_preprocess
        from megatron_7b.data.reading.sources import find_sources
        from megatron_7b.tokenizer.checked import EngineRejectedError, TrustedEngine
        from megatron_7b.tokenizer.engines import build_reference_engine

        total = sum(source.share for source in sources)
        try:
            if not journal.needs_reference:
                encoder = self._build_encoder()
                with self._open_progress(total) as progress:
                    return run_preprocess(job, sources, encoder, progress, journal)
        except EngineRejectedError as error:
            if self._options.engine not in ("auto", "tokenizers"):
                raise DataFormatError(str(error), hint="--engine tokenizers is right by definition") from error
            self._say(f"{error}\nStarting again with the reference.")
            journal.needs_reference = True  # also for whoever continues this run
        encoder = TrustedEngine(build_reference_engine(self._tokenizer))
        with self._open_progress(total) as progress:
            return run_preprocess(job, _take_part(find_sources(inputs), job), encoder, progress, journal)

    def _build_encoder(self) -> "BatchEncoder":
        from megatron_7b.data._index import find_unknown
        from megatron_7b.tokenizer.checked import CheckedEngine, TrustedEngine
        from megatron_7b.tokenizer.engines import build_reference_engine

        reference = build_reference_engine(self._tokenizer)
        reference.encode_flat(["built at first use"])
        fast, reason = self._building.result()
        if fast is None:
            if self._options.engine == "auto" and self._tokenizer.kind != "bytes":
                self._say(f"engine: {reference.name} ({reason})")
            return TrustedEngine(reference)
        checked = CheckedEngine(fast, reference, verify=self._options.verify, find_unknown=find_unknown)
        checked.probe(self._tokenizer)
        return checked


class _Silent:
    """Progress that nobody sees; warnings are logged."""

    def update(self, bytes_read: int, documents: int, tokens: int) -> None:
        """Show nothing."""

    def warn(self, message: str) -> None:
        logger.warning("%s", message)


def _take_part(sources: "Sequence[Source]", job: "PreprocessJob") -> "Sequence[Source]":
    from megatron_7b.data.preprocess.shards import take_shard

    return sources if job.shard is None else take_shard(sources, job.shard, job.text_documents)
