"""Documents through one step after another, with an account and samples of what each dropped."""

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from megatron_7b.prepare.accounting import Distributions, Sample, StageCount
from megatron_7b.prepare.document import BatchStep, Document, DocumentStep, Removed
from megatron_7b.prepare.running.heartbeat import Heartbeat

SAMPLES_PER_SHARD = 5
"""Of each reason."""
_SAMPLE_CHARACTERS = 2000


class Ledger:
    """What happens to the documents of one shard.

    Args:
        heartbeat: Is told which document which step looks at; without one, nobody is.
    """

    def __init__(self, heartbeat: Heartbeat | None = None) -> None:
        self._heartbeat = heartbeat or Heartbeat()
        self.stages: dict[str, StageCount] = {}
        self.distributions = Distributions()
        self.samples: list[Sample] = []
        self._sampled: Counter[str] = Counter()
        self._process = psutil.Process()

    def stage(self, name: str) -> StageCount:
        """Return the count of a stage, made at its first mention; stages keep that order."""
        return self.stages.setdefault(name, StageCount(name))

    def pass_step(self, name: str, step: DocumentStep | None, documents: Sequence[Document]) -> list[Document]:
        """Send documents through a step; None lets all of them pass, and counts them."""
        count, started = self.stage(name), time.process_time()
        count.documents_in += len(documents)
        count.characters_in += sum(len(document.text) for document in documents)
        kept: list[Document] = []
        if step is None:
            kept = list(documents)
        else:
            self._heartbeat.begin(name)
            for document in documents:
                self._heartbeat.beat(document.source, document.position)
                outcome = step(document)
                if isinstance(outcome, Removed):
                    self.remove(count, document, outcome)
                else:
                    kept.append(outcome)
            changes = getattr(step, "changes", None)
            if changes:
                count.changes.update(changes)
                changes.clear()
        self._close(count, kept, time.process_time() - started)
        return kept

    def pass_batch(self, step: BatchStep, documents: Sequence[Document], folder: Path) -> list[Document]:
        """Send documents through a step that looks at all of them together."""
        count, started = self.stage(step.name), time.perf_counter()
        count.documents_in += len(documents)
        count.characters_in += sum(len(document.text) for document in documents)
        result = step.run(documents, folder)
        count.added += result.added
        for document, removed in result.removed:
            self.remove(count, document, removed)
        self._close(count, result.documents, time.perf_counter() - started)  # it mostly waits
        return result.documents

    def remove(self, count: StageCount, document: Document, removed: Removed) -> None:
        """Count a document that goes, and keep it for reading if there are few of its kind."""
        count.removed[removed.reason] += 1
        if self._sampled[removed.reason] < SAMPLES_PER_SHARD:
            self._sampled[removed.reason] += 1
            text = document.text[:_SAMPLE_CHARACTERS]
            sample = Sample(count.name, removed.reason, removed.detail, document.source, document.position, text)
            self.samples.append(sample)

    def note_memory(self, count: StageCount) -> None:
        """Note how large the process is now."""
        count.peak_memory = max(count.peak_memory, self._process.memory_info().rss)

    def note_lengths(self, kind: str, documents: Sequence[Document]) -> None:
        """Count documents by the bit length of their size."""
        counts = self.distributions.lengths.setdefault(kind, Counter())
        counts.update(len(document.text).bit_length() for document in documents)

    def note_sources(self, kind: str, sources: Sequence[str]) -> None:
        """Count documents, or records, by their file."""
        for source, number in Counter(sources).items():
            self.distributions.sources.setdefault(source, Counter())[kind] += number

    def to_json(self) -> dict[str, Any]:
        """Return what the main process adds up."""
        return {
            "stages": [stage.to_json() for stage in self.stages.values()],
            "distributions": self.distributions.to_json(),
        }

    def _close(self, count: StageCount, kept: Sequence[Document], seconds: float) -> None:
        count.kept += len(kept)
        count.characters_kept += sum(len(document.text) for document in kept)
        count.seconds += seconds
        self.note_memory(count)
        count.check()
