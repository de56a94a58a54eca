"""Read, parse, encode, write: overlapped on all cores, in input order, in bounded memory, and survivable.

The main thread reads blocks and writes results; `num_workers` threads parse and encode in between, which is enough
because decompression, hashing, parsing, encoding and writing all release the GIL. At most a few blocks per worker are
under way. Every now and then the journal notes how far the written results go: see `journal`.
"""

import errno
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from megatron_7b import __version__
from megatron_7b.data.corpus.indexed_dataset import token_dtype_for
from megatron_7b.data.corpus.manifest import EngineFacts, Manifest
from megatron_7b.data.corpus.publish import get_suffixed, publish
from megatron_7b.data.preprocess.encoding import BatchEncoder, EncodedBlock, EncodingOptions, encode_block
from megatron_7b.data.preprocess.job import PreprocessJob, PreprocessReport
from megatron_7b.data.preprocess.journal import Entry, Journal
from megatron_7b.data.preprocess.output import CorpusOutput, OutputState, examine
from megatron_7b.data.reading.blocks import Block, Cursor
from megatron_7b.data.reading.progress import ReadingProgress
from megatron_7b.data.reading.records import BadRecord
from megatron_7b.data.reading.sources import Source, SourceRecord
from megatron_7b.errors import DataFormatError

NUM_BAD_KEPT = 10
"""How many bad records and differences are kept in words; the rest is counted."""
SECONDS_BETWEEN_CHECKPOINTS = 0.25
"""A checkpoint costs some 50 µs."""
_COUNTERS = ("documents", "num_bad", "num_differences", "compared_texts", "compared_characters")
_BLOCKS_PER_WORKER = 3
_EXCERPT_CHARACTERS = 2048


class Progress(ReadingProgress, Protocol):
    """Told after every block, and what the user should read."""

    def warn(self, message: str) -> None:
        """Show something that the user should read while the run continues."""


@dataclass(slots=True)
class _Place:
    """How far the input has been read after a block."""

    source: int
    cursor: Cursor
    owed: float
    """Characters of the sample that blocks so far were too small for."""
    bytes_read: int


def run_preprocess(
    job: PreprocessJob, sources: Sequence[Source], encoder: BatchEncoder, progress: Progress, journal: Journal
) -> PreprocessReport:
    """Preprocess all sources into one corpus per key, from the journal's last checkpoint on.

    Nothing is published unless all of it succeeds. If it cannot succeed nothing is left; if it was stopped (a
    signal, a full disk), journal and temporary files stay, and the same call continues.

    Raises:
        DataFormatError: A source is damaged as a whole, no document came out, a record is bad and the job strict, or
            the disk is full.
    """
    run = _Run(job, sources, encoder, progress, journal)
    try:
        run.execute()
    except (KeyboardInterrupt, SystemExit, MemoryError):
        run.suspend()
        raise
    except OSError as error:
        run.suspend()
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DataFormatError(f"{error}", hint="make room; the same command then continues") from error
    except BaseException:
        run.abort()
        raise
    publish_all(job, journal)
    return run.report


def publish_all(job: PreprocessJob, journal: Journal) -> None:
    """Give all corpora of a complete run their names; the journal has served its purpose then."""
    for prefix in job.get_output_prefixes():
        publish(prefix)
    journal.remove()


class _Run:
    def __init__(
        self,
        job: PreprocessJob,
        sources: Sequence[Source],
        encoder: BatchEncoder,
        progress: Progress,
        journal: Journal,
    ) -> None:
        self._job, self._sources, self._encoder = job, sources, encoder
        self._progress, self._journal = progress, journal
        self.report = job.report("written")
        self.report.engine, self.report.input_bytes = encoder.name, sum(source.share for source in sources)
        self._outputs: list[CorpusOutput] = []
        self._options = EncodingOptions(
            keys=job.keys,
            dtype=token_dtype_for(job.tokenizer.vocab_size),
            eod_id=job.tokenizer.eod_id if job.append_eod else None,
            bos_id=job.tokenizer.bos_id if job.prepend_bos else None,
            split_sentences=job.split_sentences,
        )
        self._num_noted = 0
        self._next_checkpoint = 0.0

    def execute(self) -> None:
        """Send all blocks through the workers and write results in order; at the end they have temporary names."""
        start = self._open_outputs()
        self._next_checkpoint = time.monotonic() + SECONDS_BETWEEN_CHECKPOINTS
        # With each block how far reading had come: progress is what has been written, not what was read ahead.
        pending: deque[tuple[Future[EncodedBlock], _Place]] = deque()
        limit = _BLOCKS_PER_WORKER * self._job.num_workers
        with ThreadPoolExecutor(self._job.num_workers, "encode") as pool:
            try:
                for block, sample, place in self._read_all(start):
                    pending.append((pool.submit(encode_block, block, self._encoder, self._options, sample), place))
                    while pending and (pending[0][0].done() or len(pending) > limit):
                        self._write(*pending.popleft())
                while pending:
                    self._write(*pending.popleft())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        self._check_result()
        self._complete()

    def suspend(self) -> None:
        """Leave everything for the same call to continue."""
        for output in self._outputs:
            output.suspend()

    def abort(self) -> None:
        """Leave no trace."""
        for output in self._outputs:
            output.abort()
        self._journal.clear()

    def _open_outputs(self) -> _Place | None:
        """New files, or those of a killed run cut to its last checkpoint that all of them still hold."""
        dtype, vocab_size = self._options.dtype, self._job.tokenizer.vocab_size
        entries = self._journal.entries
        remains = [
            examine(prefix, dtype, [OutputState(**entry["outputs"][index]) for entry in entries])
            for index, prefix in enumerate(self.report.prefixes)
        ]
        if not (num_kept := min(len(one.states) for one in remains)):
            if entries:
                self._progress.warn(f"the files that {self._journal.path} tells of are not there: starting again")
            self._journal.begin()
            for prefix in self.report.prefixes:
                self._outputs.append(CorpusOutput(prefix, dtype, vocab_size))
            return None
        self._journal.keep(num_kept)
        for prefix, one in zip(self.report.prefixes, remains, strict=True):
            self._outputs.append(CorpusOutput.resume(prefix, dtype, vocab_size, one, num_kept - 1))
        return self._restore(entries[:num_kept])

    def _restore(self, entries: Sequence[Entry]) -> _Place:
        """Return what the last of these checkpoints says."""
        report, last = self.report, entries[-1]
        for entry in entries:
            for path, size, digest, span in entry["finished"]:
                self._sources[self._num_noted].restore(
                    SourceRecord(path, size, digest, None if span is None else (span[0], span[1]))
                )
                self._num_noted += 1
        for name in _COUNTERS:
            setattr(report, name, last[name])
        report.continued_at = report.documents
        report.first_bad = [BadRecord(Path(source), number, reason) for source, number, reason in last["first_bad"]]
        report.tokens = sum(output.num_tokens for output in self._outputs)
        return _Place(last["source"], Cursor(*last["cursor"]), last["owed"], 0)

    def _read_all(self, start: _Place | None) -> Iterator[tuple[Block, int, _Place]]:
        """Yield the blocks with their share of the sample, in excerpts: the share of small blocks is saved up."""
        job, total = self._job, max(1, sum(source.share for source in self._sources))
        first = 0 if start is None else start.source
        owed = float(_EXCERPT_CHARACTERS) if start is None else start.owed  # the first block is always sampled
        for index, source in enumerate(self._sources[first:], first):
            cursor = start.cursor if start is not None and index == first else None
            for block in source.read_blocks(job.keys, job.text_documents, job.block_bytes, cursor):
                owed += job.sample_characters * (len(block.data) or job.block_bytes) / total
                sample = int(owed) if owed >= _EXCERPT_CHARACTERS else 0
                owed -= sample
                yield block, sample, _Place(index, block.end, owed, sum(one.bytes_read for one in self._sources))
            if source.has_changed():
                self._progress.warn(
                    f"{source.path} was changed while it was read: the corpus may be of neither version"
                )

    def _write(self, encoding: Future[EncodedBlock], place: _Place) -> None:
        report, block = self.report, encoding.result()
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
        report.compared_texts += block.compared_texts
        report.compared_characters += block.compared_characters
        report.documents += block.num_records
        report.tokens = sum(output.num_tokens for output in self._outputs)
        self._progress.update(place.bytes_read, report.documents, report.tokens)
        if time.monotonic() >= self._next_checkpoint:
            self._note_checkpoint(place)
            self._next_checkpoint = time.monotonic() + SECONDS_BETWEEN_CHECKPOINTS

    def _note_checkpoint(self, place: _Place) -> None:
        report = self.report
        finished = [source.to_record() for source in self._sources[self._num_noted : place.source]]
        self._num_noted = place.source
        self._journal.append(
            {
                "source": place.source,
                "cursor": place.cursor,
                "owed": place.owed,
                "finished": [[one.path, one.size, one.xxh3_128, one.span] for one in finished],
                **{name: getattr(report, name) for name in _COUNTERS},
                "first_bad": [[str(bad.source), bad.number, bad.reason] for bad in report.first_bad],
                "outputs": [asdict(output.checkpoint()) for output in self._outputs],
            }
        )

    def _check_result(self) -> None:
        if self._job.shard is not None:
            return  # a shard may be without documents; whether the corpus is shows when it is merged
        for output in self._outputs:
            if output.num_tokens == 0:
                first = "\n".join(f"  {bad}" for bad in self.report.first_bad)
                documents = f"{self.report.documents} documents, all empty" if self.report.documents else "no document"
                is_text = all(source.format == ".txt" for source in self._sources)
                raise DataFormatError(
                    f"no token for {output.prefix}: {documents}, {self.report.num_bad} records left out"
                    + (f", the first:\n{first}" if first else ""),
                    hint="the input must be UTF-8; `iconv` converts it"
                    if is_text
                    else "check --json-keys and that the input is one JSON object per line",
                )

    def _complete(self) -> None:
        for key, output in zip(self._job.keys, self._outputs, strict=True):
            counts, bin_facts, idx_facts = output.complete()
            self.report.empty_documents += counts.empty_documents
            Manifest(
                tokenizer=self._job.tokenizer,
                counts=replace(counts, bad_records=self.report.num_bad),
                token_bytes=self._options.dtype.itemsize,
                bin=bin_facts,
                idx=idx_facts,
                options=self._describe_options(key),
                engine=self._describe_engine(),
                sources=[source.to_record() for source in self._sources],
                bad_records=[str(bad) for bad in self.report.first_bad],
                command=list(self._job.command),
                version=__version__,
                job_hash=self._journal.job_hash,
            ).write(get_suffixed(output.prefix, ".json.tmp"))
        self._journal.complete()

    def _describe_options(self, key: str) -> dict[str, Any]:
        job = self._job
        return {
            "key": key,
            "keys": list(job.keys),
            "level": job.level,
            "append_eod": job.append_eod,
            "prepend_bos": job.prepend_bos,
            "text_documents": job.text_documents,
            **({} if job.shard is None else {"shard": str(job.shard), "inputs": job.inputs_hash}),
        }

    def _describe_engine(self) -> EngineFacts:
        return EngineFacts(
            name=self._encoder.name,
            checked_texts=self.report.compared_texts,
            checked_characters=self.report.compared_characters,
            replaced_documents=self.report.num_differences,
        )
