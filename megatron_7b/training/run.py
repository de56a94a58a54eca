"""The state of a run in progress: what the loop and its hooks share."""

import dataclasses
import logging
import time
from pathlib import Path

from megatron_7b.checkpoint import Companions
from megatron_7b.checkpoint.base import TrainedPart
from megatron_7b.checkpoint.manifest import Counters
from megatron_7b.checkpoint.pending import PendingSave
from megatron_7b.config.schema import RunConfig
from megatron_7b.errors import TrainingError
from megatron_7b.runtime.machine.hardware import device_memory_bytes, peak_memory_bytes
from megatron_7b.runtime.process.signals import EXIT_FINISHED, EXIT_SAVED, StopReason, StopRequest
from megatron_7b.training.agreement import Ranks
from megatron_7b.training.assemble import Trainer
from megatron_7b.training.learner import Learner
from megatron_7b.training.memory_report import MemoryKinds
from megatron_7b.training.metrics import Throughput
from megatron_7b.training.opening import OpenFolder
from megatron_7b.training.run_folder import RunFolder
from megatron_7b.training.timing import StepTiming

logger = logging.getLogger(__name__)

# What the ranks tell one another of the run folder.
_MOVED, _DELETED = 1, 2


@dataclasses.dataclass
class Run:
    """A run between its start and its end, on one rank.

    Attributes:
        trainer: Model, optimizer and data.
        folder: Where the run lives.
        ranks: All ranks, to agree with.
        stop_request: What signals and the time limit have asked of this process.
        throughput: Turns step times into rates.
        timing: Reports where the time of steps goes.
        memory: Reports what memory is held for.
        counters: Steps done and samples read: what a checkpoint records beside the tensors.
        stop: Why all ranks stop after the current step; NONE while they continue.
        peak_memory_bytes: Most memory that any rank has held.
        device_memory_bytes: Most memory that was taken of any rank's GPU at the end of a step; None without GPUs.
        validated_step: Newest step with a validation in metrics.jsonl.
        evaluated_step: Newest step with a measurement on tasks there.
        opened: The main rank's hold on the folder.
        saved: Progress at the newest checkpoint of the folder; None if there is none.
        resumed: Progress at the beginning of this start.
        pending: The save that is in progress while training continues, and the progress that it saves.
        last_step_skipped: Whether the last step of this start left the parameters as they were.
        departure: Where the folder is by now, if it was moved while the run was in progress.
        early_end: Why the run is complete although not all steps are done, if `finish_early` was called.
        part: What checkpoints hold, if not the whole model.
        failure: Why the run fails, once it does.
    """

    trainer: Trainer
    folder: RunFolder
    ranks: Ranks
    stop_request: StopRequest
    throughput: Throughput
    timing: StepTiming
    memory: MemoryKinds
    counters: Counters = dataclasses.field(default_factory=Counters)
    stop: StopReason = StopReason.NONE
    peak_memory_bytes: int = 0
    device_memory_bytes: int | None = None
    validated_step: int = 0
    evaluated_step: int = 0
    opened: OpenFolder | None = None
    saved: Counters | None = None
    resumed: Counters = dataclasses.field(default_factory=Counters)
    pending: tuple[PendingSave, Counters] | None = None
    last_step_skipped: bool = False
    departure: Path | None = None
    early_end: str | None = None
    part: TrainedPart | None = None
    failure: BaseException | None = None

    @property
    def learner(self) -> Learner:
        """The model, its optimizer and objective."""
        return self.trainer.learner

    @property
    def config(self) -> RunConfig:
        """The effective configuration."""
        return self.learner.config

    @property
    def companions(self) -> Companions:
        """What checkpoints carry, as the run folder has it."""
        trainer, folder = self.trainer, self.folder
        return Companions(
            tokenizer=folder.tokenizer if trainer.tokenizer is not None else None,
            hugging_face=folder.hugging_face if trainer.companions.hugging_face is not None else None,
        )

    @property
    def step(self) -> int:
        """Steps done, skipped ones included."""
        return self.counters.step

    @property
    def is_complete(self) -> bool:
        """Whether all steps are done, or no more are wanted."""
        return self.step >= self.config.training.train_steps or self.early_end is not None

    def is_time(self, interval: int) -> bool:
        """Whether what is done every `interval` steps, and at the end, is to be done now; 0: at the end alone."""
        return self.is_complete or (interval > 0 and self.step % interval == 0)

    @property
    def must_stop(self) -> bool:
        """Whether something ends this start, complete or not."""
        return self.stop is not StopReason.NONE or self.departure is not None

    @property
    def is_leaving(self) -> bool:
        """Whether there is no next step in this start."""
        return self.is_complete or self.must_stop

    @property
    def exit_code(self) -> int:
        """Exit code if the process left now, all saved: 0 only for a run that is complete."""
        return EXIT_FINISHED if self.is_complete and self.stop is StopReason.NONE else EXIT_SAVED

    def count_step(self, num_samples: int, *, skipped: bool) -> None:
        """Move the counters on by one step."""
        before = self.counters
        self.counters = Counters(
            step=before.step + 1,
            consumed_samples=before.consumed_samples + num_samples,
            consumed_tokens=before.consumed_tokens + num_samples * self.config.data.seq_length,
            optimizer_steps=before.optimizer_steps + (0 if skipped else 1),
        )
        self.last_step_skipped = skipped

    def finish_early(self, reason: str) -> None:
        """Let this step be the last: the run is saved and ends as complete, with exit code 0.

        Args:
            reason: For the log: "the loss is below 2".

        Collective: all ranks have to call it after the same step.
        """
        self.early_end = reason

    def agree_on_stop(self) -> None:
        """Agree on whether to stop, even if only one rank was asked to, and on what else all have to know.

        That is the memory in use, where the folder is, and whether a report of the time is overdue.

        Collective: all ranks.

        Raises:
            TrainingError: The run folder was deleted.
        """
        place = self.opened.lock.find_folder() if self.opened is not None else self.folder.root
        has_left = 0 if place == self.folder.root else _DELETED if place is None else _MOVED
        device_type = self.learner.on_ranks.device_type
        stop, memory, of_device, has_left, is_overdue = self.ranks.maximum(
            self.stop_request.reason,
            peak_memory_bytes(device_type),
            max(device_memory_bytes(device_type) or 0, self.device_memory_bytes or 0),
            has_left,
            int(self.timing.seems_overdue),
        )
        self.stop, self.peak_memory_bytes, self.timing.is_overdue = StopReason(stop), memory, bool(is_overdue)
        self.device_memory_bytes = of_device or None
        if has_left:
            self._follow_folder(place)

    def _follow_folder(self, place: Path | None) -> None:
        """Write where the folder is by now. Collective: all ranks.

        Args:
            place: On the main rank, where that is.
        """
        place = self.ranks.from_main(place)
        if place is None:
            raise TrainingError(
                f"the run folder {self.folder.root} was deleted while the run was in progress, so nothing of it can be "
                f"saved; it was at step {self.step}",
                hint="restore the folder, if you can, or choose another --run-dir",
            )
        if self.ranks.is_main:
            logger.warning("%s has been moved to %s: saving there, and leaving", self.folder.root, place)
        self.departure, self.folder = place, RunFolder(place)


class Stopwatch:
    """Wall time since its making."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self._start
