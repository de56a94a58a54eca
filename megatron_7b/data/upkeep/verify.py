"""Whether a corpus is still what its manifest says: hashes, structure, counts, ids."""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from megatron_7b.data.corpus.indexed_dataset import IndexedDataset, resolve_prefix
from megatron_7b.data.corpus.manifest import FileFacts, Manifest
from megatron_7b.data.corpus.manifest_reader import find_edit, load_manifest, manifest_path, token_dtype
from megatron_7b.data.corpus.scan import (
    Advance,
    ScannedBin,
    count_empty_documents,
    document_of,
    scan_bin,
    scan_file,
    tell_nobody,
)
from megatron_7b.errors import DataFormatError, PathError


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it should be."""

    file: str
    what: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}: expected {self.expected}, found {self.found}"


@dataclass
class CorpusReport:
    """What `verify_corpora` found out about one corpus."""

    prefix: str
    documents: int | None = None
    """As the index says; None if it cannot be read."""
    tokens: int | None = None
    bytes_hashed: int = 0
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class CorpusCheck:
    """One corpus to be verified; making it reads no more than the manifest."""

    def __init__(self, prefix: str) -> None:
        self.report = CorpusReport(prefix)
        self._manifest: Manifest | None = None
        self._dataset: IndexedDataset | None = None
        self._exists = False
        try:
            self.report.prefix = resolve_prefix(prefix)
            self._exists = True
            self._manifest = load_manifest(self.report.prefix)
            if edit := find_edit(self.report.prefix):
                self._add(str(manifest_path(self.report.prefix)), "checksum of its own content", *edit)
        except (DataFormatError, PathError) as error:
            file = str(manifest_path(self.report.prefix)) if self._exists else prefix
            self._add(file, "reading", "a manifest" if self._exists else "a corpus", error.args[0])
        else:
            if self._manifest is None:
                self.report.warnings.append(
                    f"{manifest_path(self.report.prefix)} does not exist, so only the structure was checked; "
                    f"`megatron-7b data adopt {self.report.prefix} --tokenizer DIR` writes it"
                )

    @property
    def exists(self) -> bool:
        """Whether there is such a corpus at all."""
        return self._exists

    @property
    def num_bytes(self) -> int:
        """Bytes that are there to be hashed."""
        if self._manifest is None:
            return 0
        files = [self._file(suffix) for suffix in (".bin", *self._side_files(self._manifest))]
        return sum(file.stat().st_size for file in files if file.is_file())

    def start(self, pool: ThreadPoolExecutor, advance: Advance) -> Callable[[], CorpusReport]:
        """Begin all passes; the result waits for them and judges."""
        if not self._exists:
            return lambda: self.report
        structure = pool.submit(IndexedDataset, self.report.prefix, verify=True)
        manifest = self._manifest
        if manifest is None:
            return lambda: self._judge_structure(structure)
        dtype, vocab_size = token_dtype(manifest), manifest.tokenizer.vocab_size
        bin_scan = pool.submit(scan_bin, self._file(".bin"), dtype, vocab_size, advance)
        side_files = self._side_files(manifest)
        scans = {suffix: pool.submit(scan_file, self._file(suffix), advance) for suffix in side_files}

        def judge() -> CorpusReport:
            self._judge_structure(structure)
            self._judge_counts(manifest)
            self._judge_bin(bin_scan, manifest)
            for suffix, scan in scans.items():
                try:
                    self._judge_file(suffix, side_files[suffix], scan.result())
                except OSError as error:
                    self._add(str(self._file(suffix)), "reading", "a readable file", error.strerror or str(error))
            return self.report

        return judge

    @staticmethod
    def _side_files(manifest: Manifest) -> dict[str, FileFacts]:
        """Files beside the .bin, by ending."""
        return {".idx": manifest.idx, **manifest.beside}

    def _file(self, suffix: str) -> Path:
        return Path(self.report.prefix + suffix)

    def _add(self, file: str, what: str, expected: object, found: object) -> None:
        self.report.problems.append(Problem(file, what, str(expected), str(found)))

    def _judge_structure(self, opening: "Future[IndexedDataset]") -> CorpusReport:
        try:
            self._dataset = opening.result()
        except DataFormatError as error:
            self._add(str(self._file(".idx")), "structure", "an index that fits its .bin", error.args[0])
        else:
            self.report.documents = self._dataset.num_documents
            self.report.tokens = self._dataset.num_tokens
        return self.report

    def _judge_counts(self, manifest: Manifest) -> None:
        dataset, counts = self._dataset, manifest.counts
        if dataset is None:
            return
        rows = (
            ("type of the ids", token_dtype(manifest), dataset.dtype),
            ("documents", counts.documents, dataset.num_documents),
            ("sequences", counts.sequences, len(dataset)),
            ("tokens", counts.tokens, dataset.num_tokens),
            ("empty documents", counts.empty_documents, count_empty_documents(dataset)),
        )
        for what, expected, found in rows:
            if expected != found:
                self._add(str(self._file(".idx")), what, expected, found)

    def _judge_bin(self, scanning: "Future[ScannedBin]", manifest: Manifest) -> None:
        name = str(self._file(".bin"))
        try:
            scan = scanning.result()
        except OSError as error:
            self._add(name, "reading", "a readable file", error.strerror or str(error))
            return
        self._judge_file(".bin", manifest.bin, scan.file)
        ids, counts = scan.ids, manifest.counts
        if (ids.min_id, ids.max_id) != (counts.min_id, counts.max_id):
            expected, found = f"{counts.min_id} to {counts.max_id}", f"{ids.min_id} to {ids.max_id}"
            self._add(name, "range of the ids", expected, found)
        if ids.first_outside is not None:
            position, value = ids.first_outside
            place = f"token {position}"
            if self._dataset is not None and self._dataset.dtype == token_dtype(manifest):
                place += f" (document {document_of(self._dataset, position)})"
            expected = f"0 to {manifest.tokenizer.vocab_size - 1}, the vocabulary"
            self._add(name, "ids", expected, f"{ids.num_outside} outside, the first {value} at {place}")

    def _judge_file(self, suffix: str, expected: FileFacts, found: FileFacts) -> None:
        self.report.bytes_hashed += found.size
        if expected.size != found.size:
            self._add(str(self._file(suffix)), "size in bytes", expected.size, found.size)
        elif expected.xxh3_128 != found.xxh3_128:
            self._add(str(self._file(suffix)), "xxh3_128", expected.xxh3_128, found.xxh3_128)


class _StoppedError(Exception):
    pass


def verify_corpora(
    corpora: Sequence[CorpusCheck | str], *, num_threads: int | None = None, advance: Advance = tell_nobody
) -> list[CorpusReport]:
    """Verify all corpora, their files side by side.

    Args:
        corpora: Prefixes, or checks that were made of them.
        num_threads: Files that are read at once, each with a buffer of a few MiB; None: one more than there are cores.
        advance: Told, from any thread, of bytes that have been read.

    Returns:
        One report per corpus, in their order: a damaged one does not keep the others from being checked.
    """
    checks = [CorpusCheck(one) if isinstance(one, str) else one for one in corpora]
    stopped = threading.Event()

    def advance_or_stop(num_bytes: int) -> None:
        if stopped.is_set():
            raise _StoppedError
        advance(num_bytes)

    with ThreadPoolExecutor(num_threads or len(os.sched_getaffinity(0)) + 1, "verify") as pool:
        try:
            return [finish() for finish in [check.start(pool, advance_or_stop) for check in checks]]
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
