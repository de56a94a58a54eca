"""The model that a preference run starts from, as the reference: how probable it finds each reply.

It is asked once, before the first step, at the layout of the run; its answers are kept beside the corpora. So no second
model has to be held while training, whether all weights are trained or only an adapter's.
"""

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from megatron_7b.checkpoint.folders import resolve_checkpoint
from megatron_7b.checkpoint.manifest import MANIFEST
from megatron_7b.config.schema import RunConfig
from megatron_7b.data.preferences.reference import PARTS, ReferenceFile
from megatron_7b.data.records.rows import RecordDataset
from megatron_7b.errors import TrainingError
from megatron_7b.files import replace_text
from megatron_7b.objective.microbatches import rounds_in_order, run_schedule
from megatron_7b.objective.preference import PreferenceTraining, ReplyProbabilities
from megatron_7b.training.run import Run

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 20.0
_NOTE = "reference.id"
"""File of the run folder that names the reference which the run has started with."""


def provide_reference(run: Run) -> None:
    """Join to the records of a preference run what the model that it starts from says of them; ask it if need be.

    Args:
        run: The weights of its starting point are loaded.

    Collective: all ranks.

    Raises:
        DataFormatError: A file of such answers is damaged.
        TrainingError: They are missing, and the run has left its starting point.
    """
    objective = run.learner.objective
    if not isinstance(objective, PreferenceTraining) or not objective.needs_reference:
        return
    known: dict[str, NDArray[np.float32]] = {}
    for loader in filter(None, (run.trainer.loader, run.trainer.valid_loader)):
        dataset = loader.dataset
        assert isinstance(dataset, RecordDataset)
        for corpus in dataset.corpora:
            prefix = str(corpus.dataset.prefix)
            if prefix not in known:
                known[prefix] = _values_of(run, prefix, corpus.num_records)
            corpus.join(known[prefix])


def reference_identity(config: RunConfig) -> str:
    """Return a hash of what decides the values beside the corpus: weights, number format, length of rows."""
    assert config.checkpoint.initialize_from is not None
    weights = resolve_checkpoint(Path(config.checkpoint.initialize_from)) / MANIFEST
    digest = xxhash.xxh3_64(weights.read_bytes())
    digest.update(f"{config.precision}\n{config.adapter.method}\n{config.data.seq_length}".encode())
    return digest.hexdigest()[:8]


def _identity_of_run(run: Run) -> str:
    """Return the identity of the reference, which a resumed run keeps wherever what it has started from is by now."""
    note = run.folder.root / _NOTE
    if run.step > 0 and note.is_file():
        return note.read_text(encoding="utf-8").strip()
    identity = reference_identity(run.config)
    replace_text(note, identity + "\n")
    return identity


def _values_of(run: Run, prefix: str, num_records: int) -> NDArray[np.float32]:
    """Return the values of a corpus on all ranks, [records, 2]. Collective: all ranks."""
    file = is_there = None
    with run.ranks.together("looking for the reference"):
        if run.ranks.is_main:
            file = ReferenceFile(prefix, _identity_of_run(run), num_records)
            is_there = file.path.is_file()
    if not run.ranks.from_main(is_there):
        if run.step > 0:
            raise TrainingError(
                f"the reference of {prefix} is missing, and the run has left the weights that it started from",
                hint="put the file PREFIX.reference-….npy back, or start again in another --run-dir",
            )
        _ask(run, prefix, file)
    values = None
    with run.ranks.together("reading the reference"):
        if file is not None:
            values = file.read()
    found = run.ranks.from_main(values)
    assert found is not None
    return found


def _ask(run: Run, prefix: str, file: ReferenceFile | None) -> None:
    """Compute the values of a corpus; what an earlier start has computed is kept. Collective: all ranks.

    Args:
        run: The run.
        prefix: Of the corpus.
        file: On the main rank, where the values go.
    """
    dataset = run.learner.objective.open_corpus(prefix, run.config, None)
    assert isinstance(dataset, RecordDataset)
    values, rows = None, None
    with run.ranks.together("opening the reference"):
        if file is not None:
            values = file.open_partial()
            rows = np.array([i for i in range(dataset.num_samples) if np.isnan(values[dataset.records_of(i)]).any()])
    rows = run.ranks.from_main(rows)
    assert rows is not None
    progress = _Progress(prefix, len(rows))
    for done, answers in _answers(run, dataset, rows):
        with run.ranks.together("keeping the reference"):
            if values is not None:
                for numbers, of_records in answers:
                    values[numbers] = of_records
                progress.say(done)
    with run.ranks.together("keeping the reference"):
        if file is not None and values is not None:
            file.complete(values)


@torch.no_grad()
def _answers(
    run: Run, dataset: RecordDataset, rows: NDArray[np.int64]
) -> Iterator[tuple[int, list[tuple[NDArray[np.int64], NDArray[np.float32]]]]]:
    """Yield how many rows are done, and the numbers and values of the records in them. Collective: all ranks."""
    learner, objective = run.learner, ReplyProbabilities(run.config)
    for chunk in learner.model:
        chunk.eval()
    for end, places in rounds_in_order(learner.layout, run.config.training.micro_batch_size, len(rows)):
        # Beyond the end, the last row is read again: it says the same.
        batches = [dataset.batch(rows[np.minimum(of_one, len(rows) - 1)]) for of_one in places]
        outputs = run_schedule(
            learner.model, batches, objective, layout=learner.layout, device=learner.device, forward_only=True
        )
        mine = []
        if outputs and learner.layout.tp_rank == 0:
            for batch, output in zip(batches, outputs, strict=True):
                assert batch.records is not None
                mine.append((batch.records.numbers, output.float().cpu().numpy().reshape(-1, PARTS)))
        yield min(end, len(rows)), [answer for answers in run.ranks.gather(mine) for answer in answers]


class _Progress:
    """Says how far it is, and how long it will take, every few seconds."""

    def __init__(self, prefix: str, num_rows: int) -> None:
        self._prefix, self._num_rows = prefix, num_rows
        self._start = self._last = time.monotonic()
        logger.info("reference: asking the model that the run starts from about %d rows of %s", num_rows, prefix)

    def say(self, done: int) -> None:
        """Log a line if one is due."""
        now = time.monotonic()
        if now - self._last >= _SECONDS_BETWEEN_LINES or done == self._num_rows:
            self._last, passed = now, now - self._start
            left = passed * (self._num_rows - done) / done
            logger.info("reference: %d of %d rows in %.0f s, %.0f s left", done, self._num_rows, passed, left)
