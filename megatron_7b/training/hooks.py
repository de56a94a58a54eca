"""What happens around the steps of a run: reporting, guarding, validation, saving.

Hooks are called at named moments, on all ranks and in the order of `start._hooks_built`, so they may communicate. To
add one, derive from `Hook`, override the moments that matter, and put it into that list.
"""

import logging
import math
from typing import override

from megatron_7b.errors import TrainingError
from megatron_7b.training.checkpointing import (
    advice_after_skipped_steps,
    save,
    save_after_skipped_step,
    save_before_failing,
)
from megatron_7b.training.metrics import StepMetrics, ValidationMetrics, perplexity
from megatron_7b.training.report import Sink
from megatron_7b.training.run import Run, Stopwatch
from megatron_7b.training.status import note_step
from megatron_7b.training.step import evaluate_step

logger = logging.getLogger(__name__)


class Hook:
    """The moments of a run; nothing happens at a moment unless it is overridden."""

    def on_start(self, run: Run) -> None:
        """Called once, before the first step of this start."""

    def after_step(self, run: Run, metrics: StepMetrics) -> None:
        """Called after each step, once all ranks know whether they stop here (`run.stop`)."""

    def before_failing(self, run: Run) -> None:
        """Called on all ranks if the run ends between two steps because something could not be read or written."""


class Reporting(Hook):
    """Passes metrics on to the sinks, which only the main rank has."""

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = sinks

    @override
    def after_step(self, run: Run, metrics: StepMetrics) -> None:
        """Write one step.

        Raises:
            OSError: It could not be written; on the other ranks CollectiveError.
        """
        with run.ranks.together(f"reporting step {metrics.step}"):
            for sink in self._sinks:
                sink.write_step(metrics)

    def report_validation(self, run: Run, metrics: ValidationMetrics) -> None:
        """Write one validation; raises as `after_step`. Collective: all ranks."""
        with run.ranks.together(f"reporting the validation at step {metrics.step}"):
            for sink in self._sinks:
                sink.write_validation(metrics)


class StatusKeeping(Hook):
    """Keeps the last step done in status.json."""

    @override
    def on_start(self, run: Run) -> None:
        if run.ranks.is_main:
            note_step(run.folder, run.step)

    @override
    def after_step(self, run: Run, metrics: StepMetrics) -> None:
        if run.ranks.is_main:
            note_step(run.folder, metrics.step)


class NonfiniteGuard(Hook):
    """Reports skipped steps, and ends a run after too many in a row."""

    def __init__(self, max_consecutive_steps: int) -> None:
        self._max_consecutive_steps = max_consecutive_steps
        self._num_consecutive = 0

    @override
    def after_step(self, run: Run, metrics: StepMetrics) -> None:
        """Count skipped steps in a row.

        Raises:
            TrainingError: There were too many. All ranks raise it, and nothing is saved.
        """
        if not metrics.skipped:
            self._num_consecutive = 0
            return
        self._num_consecutive += 1
        culprit = "loss" if not math.isfinite(metrics.loss) else "gradient"
        if run.ranks.is_main:
            logger.warning(
                "step %d was skipped: its %s is not finite (loss %g, gradient norm %g); parameters are unchanged",
                metrics.step, culprit, metrics.loss, metrics.grad_norm,
            )  # fmt: skip
        if self._num_consecutive >= self._max_consecutive_steps:
            raise TrainingError(
                f"steps {metrics.step - self._num_consecutive + 1} to {metrics.step} were all skipped, because loss or "
                f"gradient was not finite (training.max_consecutive_nonfinite_steps is {self._max_consecutive_steps})",
                hint=advice_after_skipped_steps(run),
            )


class Validation(Hook):
    """Measures the validation loss at an interval and at the end, on the same samples each time."""

    def __init__(self, reporting: Reporting) -> None:
        self._reporting = reporting

    @override
    def on_start(self, run: Run) -> None:
        # A run that stopped right after a step left the validation of that step to the next start.
        if run.step > run.validated_step and self._is_due(run):
            self._validate(run)

    @override
    def after_step(self, run: Run, metrics: StepMetrics) -> None:
        if not run.must_stop and self._is_due(run):
            self._validate(run)

    def _is_due(self, run: Run) -> bool:
        interval = run.config.training.eval_interval_steps
        is_time = run.is_complete or (interval > 0 and run.step % interval == 0)
        return is_time and run.trainer.valid_loader is not None

    def _validate(self, run: Run) -> None:
        """Measure and report; a request to stop ends it without a result. Collective: all ranks."""
        watch, batch_size, loader = Stopwatch(), run.config.training.global_batch_size, run.trainer.valid_loader
        assert loader is not None
        # A small validation set is read once rather than repeatedly.
        num_batches = min(run.config.training.eval_steps, max(1, loader.dataset.num_samples // batch_size))
        loss_sum, num_tokens = 0.0, 0
        for index in range(num_batches):
            with run.ranks.together(f"reading validation batch {index + 1}"):
                batches = loader.batches(index * batch_size, batch_size)
            losses = evaluate_step(run.trainer, batches)
            loss_sum, num_tokens = loss_sum + losses.loss_sum, num_tokens + losses.num_tokens
            run.look_around()
            if run.must_stop:
                return
        loss = loss_sum / max(1, num_tokens)
        run.validated_step = run.step
        self._reporting.report_validation(
            run,
            ValidationMetrics(
                step=run.step,
                consumed_samples=run.counters.consumed_samples,
                consumed_tokens=run.counters.consumed_tokens,
                validation_loss=loss,
                validation_perplexity=perplexity(loss),
                validation_tokens=num_tokens,
                validation_seconds=watch.seconds,
            ),
        )


class Saving(Hook):
    """Saves at an interval, at the end and before an early end; at an interval only after a step that was applied."""

    def __init__(self) -> None:
        self._is_overdue = False

    @override
    def after_step(self, run: Run, metrics: StepMetrics) -> None:
        """Save if it is time to.

        Raises:
            TrainingError: The run ends with a skipped step, and cannot be continued as it is.
            CheckpointError: The checkpoint could not be written.
        """
        interval = run.config.checkpoint.save_interval_steps
        is_due = self._is_overdue or run.is_leaving or (interval > 0 and run.step % interval == 0)
        if not is_due:
            return
        # Once an update has driven the weights out of range, every later step is skipped. Saving them would eventually
        # push all good checkpoints out of the folder, so a save waits for a step that shows the weights are sound.
        self._is_overdue = metrics.skipped
        if not self._is_overdue:
            save(run, to_resume=run.must_stop)
        elif run.is_leaving:
            save_after_skipped_step(run)

    @override
    def before_failing(self, run: Run) -> None:
        """Save what was trained since the last checkpoint; the run fails for its own reason, even if this fails too."""
        save_before_failing(run)
