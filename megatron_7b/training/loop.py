"""The training loop: from the first step or the newest checkpoint to the last step or a request to stop."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from megatron_7b.config.schema import RunConfig
from megatron_7b.model.adapter import Adapter
from megatron_7b.optim.schedules import learning_rate
from megatron_7b.runtime.machine.part_clock import HOOKS
from megatron_7b.runtime.process.signals import StopRequest
from megatron_7b.training.batch_schedule import global_batch_size
from megatron_7b.training.hooks import Hook, ending
from megatron_7b.training.metrics import StepMetrics
from megatron_7b.training.run import Run, Stopwatch
from megatron_7b.training.run_folder import RunFolder
from megatron_7b.training.start import begin_run, open_run
from megatron_7b.training.step import train_step


def pretrain(
    config: RunConfig,
    run_dir: Path,
    stop_request: StopRequest | None = None,
    *,
    hooks: Sequence[Hook] = (),
    adapter: Adapter | None = None,
) -> int:
    """Train a model in a run folder; a folder that has checkpoints is resumed from its latest.

    The signals of `runtime.signals`, Ctrl-C among them, and `training.exit_after_seconds` end the run after the current
    step, with everything saved.

    Args:
        config: The run, checked.
        run_dir: The run folder, which has passed `check_run_folder`; created if necessary.
        stop_request: What listens for requests to stop; None makes one that takes note until the first step is done.
        hooks: Of the caller, for this start; called after those of the package, and before the step is saved.
        adapter: Added to the model; only what it trains is trained. A later start of the run needs it again.

    Returns:
        0 when all steps are done, 75 when the run stopped early and the same command continues it.

    Collective: all ranks of the launcher's world, each from its main thread.

    Raises:
        MegatronError: Anything that the user can fix: see megatron_7b.errors.
    """
    folder = RunFolder(Path(run_dir))
    with contextlib.ExitStack() as stack:
        if stop_request is None:
            stop_request = StopRequest(config.training.exit_after_seconds)
            stack.enter_context(stop_request.listening())
        run = stack.enter_context(open_run(config, folder, stop_request, adapter))
        all_hooks = stack.enter_context(begin_run(run, hooks))
        train(run, all_hooks, hooks)
    return run.exit_code


def train(run: Run, hooks: Sequence[Hook], callers: Sequence[Hook] = ()) -> None:
    """Do steps until all are done, or all ranks have agreed to stop.

    If something cannot be read or written between two steps, the steps before are saved first.

    Args:
        run: Begun.
        hooks: All of them, in their order.
        callers: Those of `hooks` that whoever started the run has brought; their time is reported.

    Collective: all ranks.
    """
    # Together: a rank that left at once while another was at its first step would look like a lost peer.
    run.ranks.maximum(0)
    run.stop_request.begin_steps()
    with ending(run, hooks):
        for hook in hooks:
            hook.on_start(run)
        while not run.is_leaving:
            metrics = do_step(run)
            for hook in hooks:
                counted = run.learner.clock.between_steps(HOOKS) if hook in callers else contextlib.nullcontext()
                with counted:
                    hook.after_step(run, metrics)


def do_step(run: Run) -> StepMetrics:
    """Read one global batch, do one update, and agree on what comes next.

    Collective: all ranks.
    """
    watch, config, clock = Stopwatch(), run.config, run.learner.clock
    batch_size = global_batch_size(run.counters.consumed_samples, config.training)
    rate = learning_rate(run.step + 1, config.optimizer, config.training.train_steps)
    norms_by = config.telemetry.parameter_norms if run.timing.is_due(run.step + 1) else "none"
    with clock.step():
        reading = run.ranks.together(f"reading the batch of step {run.step + 1}")
        with clock.part("communication"), reading, clock.part("data"):  # the wait for other ranks comes after it
            batches = run.trainer.loader.batches(run.counters.consumed_samples, batch_size)
        result = train_step(run.learner, batches, rate, norms_by)
    seconds = watch.seconds
    run.count_step(batch_size, skipped=result.skipped)
    run.agree_on_stop()
    timing = run.timing.report(run.step)
    tokens_per_second, tflops, mfu = run.throughput.rates(batch_size * config.data.seq_length, seconds)
    return StepMetrics(
        step=run.step,
        consumed_samples=run.counters.consumed_samples,
        consumed_tokens=run.counters.consumed_tokens,
        loss=result.loss,
        learning_rate=rate,
        grad_norm=result.grad_norm,
        step_seconds=seconds,
        tokens_per_second=tokens_per_second,
        tflops_per_device=tflops,
        mfu=mfu,
        memory_bytes=run.peak_memory_bytes,
        device_memory_bytes=run.device_memory_bytes,
        skipped=result.skipped,
        extra=result.losses.extra,
        timing=timing,
        norms=result.norms,
        memory=run.memory.report() if timing is not None else None,
    )
