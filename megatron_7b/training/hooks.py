"""What happens around the steps of a run: reporting, guarding, validation, saving.

Hooks are called at named moments, on all ranks and in the order of `start._build_hooks`, so they may communicate. To
add one to a run, derive from `Hook`, override the moments that matter, and give it to `training.pretrain`.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import override

import torch.distributed as dist

from megatron_7b.errors import TrainingError
from megatron_7b.objective.distillation import TASK_LOSS
from megatron_7b.parallel.groups import new_background_group
from megatron_7b.training.checkpointing import (
    advice_after_skipped_steps,
    finish_save,
    save,
    save_after_skipped_step,
    save_before_failing,
)
from megatron_7b.training.metrics import StepMetrics, TaskMetrics, ValidationMetrics, perplexity
from megatron_7b.training.run import Run, Stopwatch
from megatron_7b.training.sink import Sink
from megatron_7b.training.status import note_step
from megatron_7b.training.step import Losses, evaluate_step

logger = logging.getLogger(__name__)


class Hook:
    """The moments of a run; nothing happens at a moment unless it is overridden.

    Every rank has a hook of its own, which may read everything that it is given, the model (`run.learner.model`)
    included. Metrics, counters and configuration are the same on all ranks, so what follows from them alone is decided
    alike everywhere, such as `run.finish_early`. What only one rank knows must be agreed on first: `run.ranks` has
    maxima, `gather` and `together`, and every collective has to be called on all ranks. An error must be raised on all
    of them, or on any in a `together` block; a rank that fails alone ends the others without a save.
    """

    def on_start(self, run: Run) -> None:
        """Called once, before the first step of this start."""

    def after_step(self, run: Run, metrics: StepMetrics) -> None:
        """Called after each step, once all ranks know whether they stop here (`run.stop`)."""

    def after_validation(self, run: Run, metrics: ValidationMetrics) -> None:
        """Called after each validation, which comes after the step that it belongs to, or before the first one."""

    def after_tasks(self, run: Run, metrics: TaskMetrics) -> None:
        """Called after each measurement on tasks (`telemetry.eval_tasks`), which comes as validations do."""

    def before_failing(self, run: Run) -> None:
        """Called on all ranks if the run ends between two steps because something could not be read or written."""

    def on_end(self, run: Run) -> None:
        """Called once at the end of this start, the last hook first, also if `on_start` has not been reached.

        If the run fails, `run.failure` says why. Other ranks may be gone then, so nothing may be asked of them; and an
        error that is raised here is logged, because the first one is what the user is told.
        """


@contextlib.contextmanager
def ending(run: Run, hooks: Sequence[Hook]) -> Iterator[None]:
    """Let hooks act when a with block ends, however it does: `before_failing` if all ranks know why, then `on_end`.

    Raises:
        Exception: What the block raised; or else what the first `on_end` raised that failed.
    """
    try:
        yield
    except BaseException as error:
        run.failure = error
        if isinstance(error, Exception) and run.ranks.failed_together:
            for hook in hooks:
                _attempt(run, hook, hook.before_failing)
        raise
    finally:
        has_failed = run.failure is not None
        for hook in reversed(hooks):
            _attempt(run, hook, hook.on_end)
        if run.failure is not None and not has_failed:
            raise run.failure


def _attempt(run: Run, hook: Hook, act: Callable[[Run], None]) -> None:
    """Call a hook at the end of a run; an error becomes the failure of the run, unless that has failed already."""
    try:
        act(run)
    except Exception as error:  # noqa: BLE001 (a hook may be anybody's)
        if run.failure is None:
            run.failure = error
        else:
            logger.error("%s could not end as it should: %s", type(hook).__name__, error)


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

    @override
    def after_validation(self, run: Run, metrics: ValidationMetrics) -> None:
        """Write one validation; raises as `after_step`."""
        with run.ranks.together(f"reporting the validation at step {metrics.step}"):
            for sink in self._sinks:
                sink.write_validation(metrics)

    @override
    def after_tasks(self, run: Run, metrics: TaskMetrics) -> None:
        """Write one measurement; raises as `after_step`."""
        with run.ranks.together(f"reporting the tasks at step {metrics.step}"):
            for sink in self._sinks:
                sink.write_tasks(metrics)


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
            finish_save(run)
            raise TrainingError(
                f"steps {metrics.step - self._num_consecutive + 1} to {metrics.step} were all skipped, because loss or "
                f"gradient was not finite (training.max_consecutive_nonfinite_steps is {self._max_consecutive_steps})",
                hint=advice_after_skipped_steps(run),
            )


class Validation(Hook):
    """Measures the validation loss at an interval and at the end, on the same samples each time."""

    def __init__(self, listeners: Sequence[Hook]) -> None:
        """Take those who are told the result.

        Args:
            listeners: Their `after_validation` is called.
        """
        self._listeners = listeners

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
        return run.is_time(run.config.training.eval_interval_steps) and run.trainer.valid_loader is not None

    def _validate(self, run: Run) -> None:
        """Measure and report; a request to stop ends it without a result. Collective: all ranks."""
        with run.learner.clock.between_steps("validating"):
            self._measure_and_report(run)

    def _measure_and_report(self, run: Run) -> None:
        watch, batch_size, loader = Stopwatch(), run.config.training.global_batch_size, run.trainer.valid_loader
        assert loader is not None
        # A small validation set is read once rather than repeatedly.
        num_batches = min(run.config.training.eval_steps, max(1, loader.dataset.num_samples // batch_size))
        total: Losses | None = None
        for index in range(num_batches):
            with run.ranks.together(f"reading validation batch {index + 1}"):
                batches = loader.batches(index * batch_size, batch_size)
            total = evaluate_step(run.learner, batches).plus(total)
            run.agree_on_stop()
            if run.must_stop:
                return
        assert total is not None
        run.validated_step = run.step
        metrics = ValidationMetrics(
            step=run.step,
            consumed_samples=run.counters.consumed_samples,
            consumed_tokens=run.counters.consumed_tokens,
            validation_loss=total.loss,
            validation_perplexity=perplexity(total.extra.get(TASK_LOSS, total.loss)),
            validation_tokens=total.num_tokens,
            validation_seconds=watch.seconds,
            extra={name: value for name, value in total.extra.items() if not math.isnan(value)},  # cached: no teacher
        )
        for hook in self._listeners:
            hook.after_validation(run, metrics)


class Saving(Hook):
    """Saves at an interval, at the end and before an early end; at an interval only after a step that was applied.

    With `checkpoint.asynchronous`, the saves of the interval are written while training continues. All ranks take note
    of one between the same two steps, once each of them knows its outcome; and the next one waits for it.
    """

    def __init__(self) -> None:
        self._is_overdue = False
        self._background: dist.ProcessGroup | None = None

    @override
    def on_start(self, run: Run) -> None:
        if run.config.checkpoint.asynchronous:
            self._background = new_background_group(run.config.runtime.distributed_timeout_minutes)

    @override
    def after_step(self, run: Run, metrics: StepMetrics) -> None:
        """Save if it is time to.

        Raises:
            TrainingError: The run ends with a skipped step, and cannot be continued as it is.
            CheckpointError: The checkpoint, or the one that was in progress, could not be written.
        """
        if run.pending is not None and run.ranks.maximum(int(not run.pending[0].is_done())) == [0]:
            finish_save(run)
        interval = run.config.checkpoint.save_interval_steps
        is_due = self._is_overdue or run.is_leaving or (interval > 0 and run.step % interval == 0)
        if is_due:
            with run.learner.clock.between_steps("saving"):
                self._save(run, metrics)

    def _save(self, run: Run, metrics: StepMetrics) -> None:
        # Once an update has driven the weights out of range, every later step is skipped. Saving them would eventually
        # push all good checkpoints out of the folder, so a save waits for a step that shows the weights are sound.
        self._is_overdue = metrics.skipped
        if not self._is_overdue:
            save(run, to_resume=run.must_stop, background=None if run.is_leaving else self._background)
        elif run.is_leaving:
            save_after_skipped_step(run)

    @override
    def before_failing(self, run: Run) -> None:
        """Save what was trained since the last checkpoint; the run fails for its own reason, even if this fails too."""
        save_before_failing(run)

    @override
    def on_end(self, run: Run) -> None:
        """Wait for the save that is in progress, whatever ends the run."""
        finish_save(run)
        if self._background is not None and run.failure is None:
            dist.destroy_process_group(self._background)
