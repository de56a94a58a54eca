"""First phase: the records of a shard to clean documents, each on its own, and their signatures."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_7b.prepare.document import Document, DuplicateFinder
from megatron_7b.prepare.duplicates.exact import ExactDuplicates
from megatron_7b.prepare.duplicates.near import NearDuplicates
from megatron_7b.prepare.reading.inputs import Shard
from megatron_7b.prepare.reading.records import Dropped, Record, Unreadable, read_piece
from megatron_7b.prepare.recipe import SECTIONS_PER_SOURCE, Recipe
from megatron_7b.prepare.running.heartbeat import Heartbeat, name_place
from megatron_7b.prepare.running.stages import Ledger
from megatron_7b.prepare.running.steps import build_steps
from megatron_7b.prepare.running.unpack_task import UNPACKED
from megatron_7b.prepare.running.workspace import describe_sections, hash_of, hash_versions, publish, write_lines

DOCUMENTS, RESULT, SAMPLES, QUARANTINE, PLACES = (
    "documents.jsonl.zst",
    "result.json",
    "samples.jsonl",
    "quarantine.jsonl",
    "places.npy",
)
BATCH_DOCUMENTS = 256
BATCH_CHARACTERS = 1 << 24
_HEAD_CHARACTERS = 200


def build_finders(recipe: Recipe) -> list[DuplicateFinder]:
    """Return the finders of duplicates that a recipe asks for, in order."""
    section = recipe.duplicates
    finders: list[DuplicateFinder] = []
    if section.exact:
        finders.append(ExactDuplicates(section))
    if section.near:
        finders.append(NearDuplicates(section))
    return finders


@dataclass(frozen=True)
class DocumentTask:
    """The first phase of one shard."""

    shard: Shard
    step_names: tuple[str, ...]
    """Stages to account for; those that this shard's recipe has not let everything pass."""
    results: Path
    """Folder in which the result appears, under a name made of all that it depends on."""

    @property
    def unpacked(self) -> Path:
        """Folder of the parts of unpacked files."""
        return self.results.parent / UNPACKED

    @property
    def label(self) -> str:
        """For messages."""
        return f"reading and filtering {self.shard.label}"

    @property
    def key(self) -> str:
        """Of everything that the result depends on."""
        sections = describe_sections(self.shard.recipe, (*SECTIONS_PER_SOURCE, "duplicates"))
        return hash_of("documents", hash_versions(), sections, self.step_names, self.shard.pieces)

    @property
    def folder(self) -> Path:
        """Where the result appears."""
        return self.results / self.key

    def run(self, heartbeat: Heartbeat) -> None:
        """Do it, unless it is done.

        Raises:
            DataFormatError: An input cannot be read.
        """
        if not self.folder.exists():
            with publish(self.folder) as folder:
                _Run(self, folder, heartbeat).execute()


class _Run:
    def __init__(self, task: DocumentTask, folder: Path, heartbeat: Heartbeat) -> None:
        self._task, self._folder, self._heartbeat = task, folder, heartbeat
        self._ledger = Ledger(heartbeat)
        self._steps = build_steps(task.shard.recipe)
        self._finders = build_finders(task.shard.recipe)
        self._signatures: dict[str, list[NDArray[np.generic]]] = {finder.name: [] for finder in self._finders}
        self._sign_seconds = dict.fromkeys(self._signatures, 0.0)
        self._files = {piece.file.path: index for index, piece in enumerate(task.shard.pieces)}
        self._places: list[tuple[int, int]] = []
        self._quarantined: list[Unreadable] = []

    def execute(self) -> None:
        """Write all files of the result."""
        write_lines(self._folder / DOCUMENTS, self._stream(), "zstd")
        ledger = self._ledger
        for name, parts in self._signatures.items():
            rows = np.concatenate(parts) if parts else self._sign_nothing(name)
            np.save(self._folder / f"{name}.npy", rows, allow_pickle=False)
        np.save(self._folder / PLACES, np.array(self._places, np.int64).reshape(-1, 2), allow_pickle=False)
        write_lines(self._folder / QUARANTINE, self._quarantined)
        write_lines(self._folder / SAMPLES, ledger.samples)
        result = {**ledger.to_json(), "documents": len(self._places), "sign_seconds": self._sign_seconds}
        write_lines(self._folder / RESULT, [result])

    def _stream(self) -> Iterator[list[Any]]:
        """Yield the kept documents, as they are written; everything else is noted on the way."""
        for documents in self._read():
            for name in self._task.step_names:
                languages = documents
                documents = self._ledger.pass_step(name, self._steps.get(name), documents)
                if name == "language":
                    found = (document.fields.get("language") for document in languages)
                    self._ledger.distributions.languages.update(one for one in found if isinstance(one, str))
            self._sign(documents)
            for document in documents:
                self._places.append((self._files[document.source], document.position))
                yield [document.text, document.source, document.position, document.fields]

    def _read(self) -> Iterator[list[Document]]:
        """Batches of documents; unreadable records and pages without text are accounted for here."""
        ledger, reading = self._ledger, self._task.shard.recipe.reading
        count = ledger.stage("reading")
        for piece in self._task.shard.pieces:
            started = time.process_time()
            for batch in _gather(map(self._skip, read_piece(piece, reading, self._task.unpacked)), self._heartbeat):
                documents = [record for record in batch if isinstance(record, Document)]
                bad = [record for record in batch if isinstance(record, Unreadable)]
                dropped = [record for record in batch if isinstance(record, Dropped)]
                count.documents_in += len(batch)
                count.kept += len(documents)
                count.quarantined += len(bad)
                characters = sum(len(document.text) for document in documents)
                count.characters_in += characters + sum(len(record.document.text) for record in dropped)
                count.characters_kept += characters
                for record in dropped:
                    ledger.remove(count, record.document, record.removed)
                self._quarantined += bad
                ledger.note_lengths("read", documents)
                ledger.note_sources("read", [piece.file.path] * (len(documents) + len(dropped)))
                ledger.note_sources("quarantined", [piece.file.path] * len(bad))
                ledger.note_memory(count)
                count.seconds += time.process_time() - started
                yield documents
                started = time.process_time()
        count.check()

    def _skip(self, record: Record) -> Record:
        """Return the record, unless it has ended the workers that looked at it."""
        if isinstance(record, Document) and self._heartbeat.skipped:
            how = self._heartbeat.skipped.get(name_place(record.source, record.position))
            if how is not None:
                return Unreadable(record.source, record.position, how, record.text[:_HEAD_CHARACTERS])
        return record

    def _sign(self, documents: list[Document]) -> None:
        texts = [document.text for document in documents]
        for finder in self._finders:
            self._heartbeat.begin(f"{finder.name}_duplicates")
            started = time.process_time()
            if texts:
                self._signatures[finder.name].append(finder.sign(texts))
            self._sign_seconds[finder.name] += time.process_time() - started

    def _sign_nothing(self, name: str) -> NDArray[np.generic]:
        finder = next(finder for finder in self._finders if finder.name == name)
        return finder.sign(["none"])[:0]


def _gather(records: Iterable[Record], heartbeat: Heartbeat) -> Iterator[list[Record]]:
    """Batches of records, small ones where documents are large."""
    batch: list[Record] = []
    characters = 0
    heartbeat.begin("reading")
    for record in records:
        batch.append(record)
        characters += len(record.text) if isinstance(record, Document) else 0
        if len(batch) == BATCH_DOCUMENTS or characters > BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
            heartbeat.begin("reading")
    if batch:
        yield batch
