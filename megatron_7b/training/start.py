"""How a run begins and ends: opening its folder, finding its place, recording its state when it leaves."""

import contextlib
import logging
from collections.abc import Iterator, Sequence

from megatron_7b.config.optimizer_config import OptimizerConfig
from megatron_7b.config.schema import RunConfig
from megatron_7b.errors import TrainingError, exit_code
from megatron_7b.model.adapter import Adapter
from megatron_7b.model.sizes import count_parameters
from megatron_7b.parallel.groups import leaving_process_groups
from megatron_7b.runtime.machine.hardware import device_name
from megatron_7b.runtime.process.logs import add_log_file, remove_log_file
from megatron_7b.runtime.process.signals import EXIT_FINISHED, EXIT_INTERRUPTED, StopReason, StopRequest
from megatron_7b.training.agreement import Ranks
from megatron_7b.training.assemble import build_trainer, keep_companions
from megatron_7b.training.best import KeepingBest
from megatron_7b.training.checkpointing import load_starting_point
from megatron_7b.training.hooks import Hook, NonfiniteGuard, Reporting, Saving, StatusKeeping, Validation
from megatron_7b.training.memory_report import MemoryKinds
from megatron_7b.training.metrics import build_throughput, format_count
from megatron_7b.training.opening import open_folder
from megatron_7b.training.plot import plot_loss
from megatron_7b.training.profiling import profiling_hooks
from megatron_7b.training.reference import provide_reference
from megatron_7b.training.report import open_sinks
from megatron_7b.training.run import Run
from megatron_7b.training.run_folder import RunFolder, RunState, keep_metrics_until
from megatron_7b.training.status import last_step, read_status, record_status
from megatron_7b.training.task_evaluation import TaskEvaluation
from megatron_7b.training.teacher_note import keep_teacher
from megatron_7b.training.timing import StepTiming

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def open_run(
    config: RunConfig, folder: RunFolder, stop_request: StopRequest, adapter: Adapter | None = None
) -> Iterator[Run]:
    """Check, then build everything that a run consists of, for the duration of a with block; nothing is written yet.

    Collective: all ranks.

    Raises:
        MegatronError: The run is impossible; whatever can be checked without building is checked first.
    """
    with leaving_process_groups(), contextlib.ExitStack() as loaders:
        trainer = build_trainer(config, folder.root, adapter)
        ranks = Ranks(trainer.learner.device)
        throughput = build_throughput(
            trainer.learner.config, world_size=ranks.world_size, device_type=trainer.learner.on_ranks.device_type
        )
        loaders.enter_context(trainer.loader)
        if trainer.valid_loader is not None:
            loaders.enter_context(trainer.valid_loader)
        learner = trainer.learner
        timing = StepTiming(learner.clock, learner.config, ranks, stage=learner.layout.pp_rank + 1)
        yield Run(trainer, folder, ranks, stop_request, throughput, timing, MemoryKinds(learner, ranks))
        # All leave together: a launcher that sees one rank exit with 75 may end the one that still writes the status.
        ranks.maximum(0)


@contextlib.contextmanager
def begin_run(run: Run, callers: Sequence[Hook] = ()) -> Iterator[list[Hook]]:
    """Open the run folder, resume where the run left off, and yield its hooks, for the duration of a with block.

    Args:
        run: From `open_run`.
        callers: Hooks of whoever started the run.

    However the block ends, status.json records it, and loss.png is drawn from the metrics so far.

    Collective: all ranks.
    """
    with _hold_folder(run), _draw_loss_at_end(run), _record_status(run):
        resume(run)
        provide_reference(run)
        keep_teacher(run)
        with _build_hooks(run, callers) as hooks:
            _say_what_begins(run)
            yield hooks
        _say_how_it_ended(run)


def resume(run: Run) -> None:
    """Load the newest complete checkpoint of the run folder, if there is one, and cut the metrics to its step.

    Collective: all ranks.

    Raises:
        CheckpointError: It is damaged, or does not fit the model.
    """
    load_starting_point(run)
    validated, evaluated = 0, 0
    with run.ranks.together("cutting the metrics to the resumed step"):
        if run.ranks.is_main:
            measured = keep_metrics_until(run.folder, run.step)
            validated, evaluated = (
                max((int(str(values["step"])) for values in measured if name in values), default=0)
                for name in ("validation_loss", "evaluation_seconds")
            )
    run.validated_step, run.evaluated_step = run.ranks.maximum(validated, evaluated)


@contextlib.contextmanager
def _build_hooks(run: Run, callers: Sequence[Hook]) -> Iterator[list[Hook]]:
    """Yield the hooks in the order in which they are called.

    Saving is last: a checkpoint exists only once its step has been reported, guarded and validated.
    """
    with contextlib.ExitStack() as held:
        sinks = []
        with run.ranks.together("opening the metrics"):
            if run.ranks.is_main:
                sinks = held.enter_context(open_sinks(run.folder, run.config, resumed_step=run.step))
        reporting = Reporting(sinks)
        guard = NonfiniteGuard(run.config.training.max_consecutive_nonfinite_steps)
        metric, patience = run.config.checkpoint.keep_best, run.config.training.early_stop_validations
        best = [] if metric is None else [KeepingBest(metric, patience)]
        listeners = [reporting, *best, *callers]
        measuring: list[Hook] = [Validation(listeners)]
        if run.trainer.tasks is not None:
            measuring.append(TaskEvaluation(run.trainer.tasks, listeners))
        ending, beginning = profiling_hooks(run.config.telemetry)
        yield [*ending, *best, reporting, StatusKeeping(), guard, *measuring, *callers, Saving(), *beginning]


@contextlib.contextmanager
def _hold_folder(run: Run) -> Iterator[None]:
    with contextlib.ExitStack() as held:
        with run.ranks.together("opening the run folder"):
            if run.ranks.is_main:
                run.opened = held.enter_context(open_folder(run.folder, run.config))
                run.folder = RunFolder(run.opened.lock.root)
                held.callback(_close_log_file, add_log_file(run.folder.log))
                keep_companions(run.trainer, run.folder)
        yield


def _close_log_file(handler: logging.Handler) -> None:
    with contextlib.suppress(OSError):  # a full disk must not hide why the run ends
        remove_log_file(handler)


@contextlib.contextmanager
def _record_status(run: Run) -> Iterator[None]:
    def record(state: RunState, code: int | None, step: int) -> None:
        if not run.ranks.is_main:
            return
        try:
            record_status(run.folder, state, exit_code=code, step=step)
        except OSError as error:  # a full disk must not hide why the run ends, nor that it was saved
            logger.error("%s could not be written: %s", run.folder.status, error.strerror)

    if run.ranks.is_main:
        _say_how_the_last_start_ended(run)
    record("running", None, last_step(run.folder))
    try:
        yield
    except BaseException as error:
        record("failed", EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else exit_code(error), run.step)
        # For the log file; the caller reports it on the screen.
        logger.debug("the run failed after step %d", run.step, exc_info=True)
        raise
    record("finished" if run.exit_code == EXIT_FINISHED else "saved", run.exit_code, run.step)


@contextlib.contextmanager
def _draw_loss_at_end(run: Run) -> Iterator[None]:
    try:
        yield
    finally:
        if run.ranks.is_main and run.config.telemetry.plot:
            _draw_loss(run)


def _draw_loss(run: Run) -> None:
    title = f"{run.folder.root.resolve().name}: {run.step} of {run.config.training.train_steps} steps"
    try:
        if plot_loss(run.folder.metrics, run.folder.loss_plot, title=title):
            logger.info("loss curves: %s", run.folder.loss_plot)
    except (ImportError, OSError, ValueError) as error:
        # The run has been saved: a plot that cannot be drawn must not make it look failed.
        logger.warning("%s was not drawn: %s", run.folder.loss_plot, error)


def _say_how_the_last_start_ended(run: Run) -> None:
    status = read_status(run.folder)
    if status.get("state") == "running":
        logger.warning("the last start was ended without a word after step %s", status.get("step"))


def _say_what_begins(run: Run) -> None:
    if not run.ranks.is_main:
        return
    training = run.config.training
    if run.is_complete:
        logger.info(
            "nothing to do: %d steps are done, and training.train_steps is %d; a larger one continues from here",
            run.step, training.train_steps,
        )  # fmt: skip
        return
    left = run.trainer.progress.tokens_left(run.config)
    tokens = format_count(left) + " tokens"
    if run.step > 0:
        tokens += f" ({format_count(run.counters.consumed_tokens + left)} with those of earlier steps)"
    if run.config.optimizer.name != OptimizerConfig.name:
        tokens += f", {run.config.optimizer.name}"
    logger.info(
        "%s parameters on %s (%s), %s: steps %d to %d, %s",
        _count(run), run.learner.layout,
        device_name(run.learner.on_ranks.device_type),
        run.folder.root, run.step + 1, training.train_steps, tokens,
    )  # fmt: skip
    if run.trainer.valid_loader is None:
        logger.info(
            "no validation: data.valid is empty, and data.split (%s) leaves no set enough documents for one sample",
            run.config.data.split,
        )


def _count(run: Run) -> str:
    """Return how many parameters there are, and how many are trained if that is not all of them."""
    count, on_ranks = count_parameters(run.config.model), run.learner.on_ranks
    own, is_whole = format_count(count), on_ranks.adapter is None or on_ranks.adapter.keeps_training
    return own if is_whole else f"{format_count(on_ranks.num_trained)} trained beside {own}"


def _say_how_it_ended(run: Run) -> None:
    if run.departure is not None and not run.is_complete:
        raise TrainingError(
            f"the run folder was moved to {run.departure} while the run was in progress; step {run.step} was saved "
            "there",
            hint=f"continue with --run-dir {run.departure}",
        )
    if not run.ranks.is_main:
        return
    if run.early_end is not None:
        logger.info("finished after step %d of %d: %s", run.step, run.config.training.train_steps, run.early_end)
        return
    if run.stop is StopReason.NONE:
        logger.info("finished: %d steps, %s tokens", run.step, format_count(run.counters.consumed_tokens))
        return
    reason = "the time limit" if run.stop is StopReason.TIME_LIMIT else run.stop.name
    logger.info("stopped after step %d because of %s; the same command continues from here", run.step, reason)
