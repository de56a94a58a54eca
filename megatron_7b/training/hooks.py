"""What happens around the steps of a run: reporting, guarding, validation, saving.

Hooks are called at named moments, on all ranks and in the order of `start._hooks_built`, so they may communicate. To
add one, derive from `Hook`, override the moments that matter, and put it into that list.
"""

import logging
import math
from typing import override

from megatron_7b.errors import MegatronError, TrainingError
from megatron_7b.runtime.signals import StopReason
from megatron_7b.training.checkpointing import save
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
        """Called on all ranks if the run ends between two steps because something could not be read."""


class Reporting(Hook):
    """Passes metrics on to the sinks, which only the main rank has."""

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = sinks

    @override
    def after_step(self, run: Run, metrics: StepMetrics) -> None:
        for sink in self._sinks:
            sink.write_step(metrics)

    def report_validation(self, metrics: ValidationMetrics) -> None:
        """Write one validation."""
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
                hint="nothing was saved since; start again from the last checkpoint with a lower optimizer.lr or a "
                "longer optimizer.lr_warmup_steps",
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
        if run.stop is StopReason.NONE and self._is_due(run):
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
            batch_loss, batch_tokens = evaluate_step(run.trainer, batches)
            loss_sum, num_tokens = loss_sum + batch_loss, num_tokens + batch_tokens
            run.look_around()
            if run.stop is not StopReason.NONE:
                return
        loss = loss_sum / max(1, num_tokens)
        run.validated_step = run.step
        self._reporting.report_validation(
            ValidationMetrics(
                step=run.step,
                consumed_samples=run.counters.consumed_samples,
                consumed_tokens=run.counters.consumed_tokens,
                validation_loss=loss,
                validation_perplexity=perplexity(loss),
                validation_tokens=num_tokens,
                validation_seconds=watch.seconds,
            )
        )


class Saving(Hook):
    """Saves at an interval, at the end and before stopping early, but only after a step that was not skipped."""

    def __init__(self) -> None:
        self._is_overdue = False
        self._is_worth_saving = False
        """Whether the last step was sound and has not been saved."""

    @override
    def after_step(self, run: Run, metrics: StepMetrics) -> None:
        """Save if it is time to.

        Raises:
            TrainingError: The last step was skipped, so the state cannot be trusted.
        """
        interval = run.config.checkpoint.save_interval_steps
        is_leaving = run.is_complete or run.stop is not StopReason.NONE
        self._is_worth_saving = not metrics.skipped
        is_due = self._is_overdue or is_leaving or (interval > 0 and run.step % interval == 0)
        if not is_due:
            return
        # Once an update has driven the weights out of range, every later step is skipped. Saving them would eventually
        # push all good checkpoints out of the folder, so a save waits for a step that shows the weights are sound.
        self._is_overdue = metrics.skipped
        if not self._is_overdue:
            save(run)
            self._is_worth_saving = False
        elif run.is_complete:
            raise TrainingError(
                f"the last step, {run.step}, was skipped, so nothing shows that the weights are sound: not saved",
                hint="raise training.train_steps by a few and start again: the run resumes from its last checkpoint",
            )
        elif is_leaving and run.ranks.is_main:
            logger.error("leaving without saving, because step %d was skipped", run.step)

    @override
    def before_failing(self, run: Run) -> None:
        """Save what was trained since the last checkpoint; the run fails for its own reason, even if this fails too."""
        if not self._is_worth_saving:
            return
        try:
            save(run, to_resume=True)
        except (MegatronError, OSError):
            logger.exception("step %d could not be saved", run.step)
