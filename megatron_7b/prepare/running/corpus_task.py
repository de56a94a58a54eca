"""Third phase: the documents of a shard that stay, split, decontaminated, rewritten and written."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_7b.prepare.augmentation.step import Augmentation
from megatron_7b.prepare.document import Document, Removed
from megatron_7b.prepare.rules.decontamination import Decontamination
from megatron_7b.prepare.rules.split import choose_split
from megatron_7b.prepare.running.document_task import DOCUMENTS, PLACES, SAMPLES, DocumentTask, build_finders
from megatron_7b.prepare.running.duplicate_task import FINDERS, KEEPERS, DuplicateTask, count_documents
from megatron_7b.prepare.running.heartbeat import Heartbeat
from megatron_7b.prepare.running.stages import Ledger
from megatron_7b.prepare.running.workspace import (
    describe_sections,
    hash_of,
    publish,
    read_lines,
    write_lines,
)

RESULT = "result.json"
SPLITS = ("train", "validation", "test")
CORPUS_SECTIONS = ("duplicates", "decontamination", "augmentation", "split", "output")


@dataclass(frozen=True)
class CorpusTask:
    """The third phase of one shard."""

    documents: DocumentTask
    duplicates: DuplicateTask
    number: int
    results: Path

    @property
    def label(self) -> str:
        """For messages."""
        return f"writing {self.documents.shard.label}"

    @cached_property
    def key(self) -> str:
        """Of everything that the result depends on; of the other shards only what they say of this one's documents."""
        keepers, finders, first = self._decisions()
        sections = describe_sections(self.documents.shard.recipe, CORPUS_SECTIONS)
        decisions = (keepers - first).tobytes(), finders.tobytes()
        return hash_of("corpus", self.documents.key, sections, *decisions)

    @property
    def folder(self) -> Path:
        """Where the result appears."""
        return self.results / self.key

    @property
    def suffix(self) -> str:
        """Of the files of documents."""
        return ".jsonl.zst" if self.documents.shard.recipe.output.compression == "zstd" else ".jsonl"

    def run(self, heartbeat: Heartbeat) -> None:  # noqa: ARG002  # its answers have a timeout of their own
        """Do it, unless it is done.

        Raises:
            MegatronError: What augmentation lacks.
        """
        if self.folder.exists():
            return
        # Answers that have been paid for outlive a killed worker, so they are beside the folder that appears at once.
        answers = self.folder.with_name(f".{self.folder.name}.answers")
        answers.mkdir(parents=True, exist_ok=True)
        with publish(self.folder) as folder:
            self._write(folder, answers)
        for file in answers.iterdir():
            file.unlink()
        answers.rmdir()

    def _write(self, folder: Path, answers: Path) -> None:
        recipe, ledger = self.documents.shard.recipe, Ledger()
        documents = self._drop_duplicates(ledger)
        if recipe.decontamination.files:
            step = Decontamination(recipe.decontamination)
            documents = ledger.pass_step(step.name, step, documents)
        # Split first: what is made from a training document is never held out, nor the other way round.
        splits: dict[str, list[Document]] = {name: [] for name in SPLITS}
        for document in documents:
            splits[choose_split(document.text, recipe.split)].append(document)
        if recipe.augmentation.method != "none":
            self._augment(ledger, splits, answers)
        for name, chosen in splits.items():
            if chosen:
                lines = (_record(document, provenance=recipe.output.provenance) for document in chosen)
                write_lines(folder / f"{name}{self.suffix}", lines, recipe.output.compression)
            size = sum(len(document.text) for document in chosen)
            ledger.distributions.splits[name] = Counter(documents=len(chosen), characters=size)
            ledger.note_lengths("kept", chosen)
            ledger.note_sources("kept", [document.source for document in chosen])
        write_lines(folder / SAMPLES, ledger.samples)
        write_lines(folder / RESULT, [ledger.to_json()])

    def _augment(self, ledger: Ledger, splits: dict[str, list[Document]], answers: Path) -> None:
        """Rewrite training documents; the others are counted as passing."""
        step = Augmentation(self.documents.shard.recipe.augmentation)
        held_out = splits["validation"] + splits["test"]
        ledger.pass_step(step.name, None, held_out)
        splits["train"] = ledger.pass_batch(step, splits["train"], answers)

    def _drop_duplicates(self, ledger: Ledger) -> list[Document]:
        keepers, finders, first = self._decisions()
        found = self._name_keepers(keepers[finders > 0])
        documents = list(self._read())
        dropped_by = dict(enumerate(finders.tolist()))
        present = list(range(len(documents)))
        for index, finder in enumerate(build_finders(self.documents.shard.recipe), start=1):
            # The decision was made; the stage only carries it out.
            reasons = {
                id(documents[row]): Removed(f"duplicate:{finder.name}", f"repeats {found[int(keepers[row])]}")
                for row in present
                if dropped_by[row] == index
            }
            step = _Decided(f"{finder.name}_duplicates", reasons)
            ledger.pass_step(step.name, step, [documents[row] for row in present])
            present = [row for row in present if dropped_by[row] != index]
        del first
        return [documents[row] for row in present]

    def _decisions(self) -> tuple[Any, Any, int]:
        """Keepers and finders of this shard's documents, and the number of its first document."""
        borders = count_documents(self.duplicates.documents)
        first, end = int(borders[self.number]), int(borders[self.number + 1])
        keepers = np.load(self.duplicates.folder / KEEPERS, mmap_mode="r")[first:end]
        finders = np.load(self.duplicates.folder / FINDERS, mmap_mode="r")[first:end]
        return keepers, finders, first

    def _name_keepers(self, keepers: Any) -> dict[int, str]:
        """File and record of documents, by their number."""
        borders = count_documents(self.duplicates.documents)
        wanted = np.unique(keepers)
        shards = np.searchsorted(borders, wanted, side="right") - 1
        names: dict[int, str] = {}
        for shard in np.unique(shards).tolist():
            task = self.duplicates.documents[shard]
            places = np.load(task.folder / PLACES, mmap_mode="r")
            for number in wanted[shards == shard].tolist():
                file, position = places[number - borders[shard]].tolist()
                names[number] = f"{task.shard.pieces[file].file.path}:{position}"
        return names

    def _read(self) -> Iterator[Document]:
        for text, source, position, fields in read_lines(self.documents.folder / DOCUMENTS):
            yield Document(text, source, position, fields)


@dataclass(frozen=True)
class _Decided:
    """A step that drops the documents of a list."""

    name: str
    reasons: dict[int, Removed]

    def __call__(self, document: Document) -> Document | Removed:
        return self.reasons.get(id(document), document)


def _record(document: Document, *, provenance: bool) -> dict[str, Any]:
    """Return a document as it is written: its text first, then its fields, then where it came from."""
    record = {"text": document.text, **document.fields}
    if provenance:
        record.update(source_file=document.source, source_record=document.position)
    return record
