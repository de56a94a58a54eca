"""A run and its checkpoints: where a start begins, what a save consists of, what is saved before an early end."""

import logging
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_7b.checkpoint.base import TrainedPart, describe_base, find_base_to_resume
from megatron_7b.checkpoint.folders import resolve_checkpoint, step_folder, step_of
from megatron_7b.checkpoint.load import load_base, load_checkpoint, load_weights
from megatron_7b.checkpoint.manifest import read_config
from megatron_7b.checkpoint.publishing import recover
from megatron_7b.checkpoint.save import begin_save
from megatron_7b.errors import CheckpointError, TrainingError
from megatron_7b.files import flush_to_disk
from megatron_7b.model.starting_head import find_head_difference
from megatron_7b.optim.state import renew_main_parameters
from megatron_7b.training.history import record_save
from megatron_7b.training.run import Run

logger = logging.getLogger(__name__)


def load_starting_point(run: Run) -> None:
    """Load the newest checkpoint of the run folder; a fresh run may start from existing weights instead.

    Collective: all ranks.

    Raises:
        CheckpointError: The checkpoint is damaged, or does not fit the model.
    """
    checkpoint, learner = _newest_checkpoint(run), run.learner
    verify, names = run.config.checkpoint.verify_on_load, learner.on_ranks.names_apart
    if names is not None:
        _load_base(run, checkpoint, names)
    if checkpoint is not None:
        run.counters = load_checkpoint(
            checkpoint,
            chunks=learner.model,
            optimizer=learner.optimizer,
            layout=learner.layout,
            verify=verify,
            on_optimizer_change=run.config.checkpoint.on_optimizer_change,
            names=names,
        )
        _check_that_data_fits(run)
        run.resumed = run.saved = run.counters
        return
    source, adapter = run.config.checkpoint.initialize_from, learner.on_ranks.adapter
    if source is not None and names is None:
        folder = resolve_checkpoint(Path(source))
        head = find_head_difference(run.config.model, read_config(folder).model)
        load_weights(
            folder,
            learner.model,
            learner.optimizer,
            verify=verify,
            may_lack=learner.on_ranks.adapter_names | head.may_lack,
            fresh=head.fresh,
            left=head.left,
            settle=adapter.settle if adapter else None,
        )
    if source is not None and run.ranks.is_main:
        logger.info("starting from the weights of %s", source)


def _load_base(run: Run, checkpoint: Path | None, names: frozenset[str]) -> None:
    """Load what an adapter is trained beside, and note what it is.

    Collective: all ranks.

    Raises:
        CheckpointError: It is not found, or not a whole model.
    """
    learner, record = run.learner, None
    with run.ranks.together("finding the model that the adapter belongs to"):
        if run.ranks.is_main:
            record = describe_base(_find_base(run, checkpoint))
    record = run.ranks.from_main(record)
    assert record is not None
    run.part = TrainedPart(names, record)
    load_base(Path(record.path), learner.on_ranks, learner.model, verify=run.config.checkpoint.verify_on_load)
    renew_main_parameters(learner.optimizer)


def _find_base(run: Run, checkpoint: Path | None) -> Path:
    source = run.config.checkpoint.initialize_from
    if checkpoint is not None:
        base = find_base_to_resume(checkpoint, source)
        if base is None:
            raise CheckpointError(
                f"{checkpoint} holds a whole model, but this run trains an adapter", hint="choose another --run-dir"
            )
        if source is not None and Path(source).exists() and (asked := resolve_checkpoint(Path(source))) != base:
            logger.warning("%s has other weights by now; the run continues beside those of %s", asked, base)
        return base
    if source is None:
        raise CheckpointError("an adapter needs a model: checkpoint.initialize_from is not set")
    return resolve_checkpoint(Path(source))


def _check_that_data_fits(run: Run) -> None:
    """Refuse a checkpoint that appeared after the data had been opened to continue from another one."""
    expected = run.trainer.progress.counters
    if run.counters != expected:
        raise TrainingError(
            f"{run.folder.checkpoints} changed during the start: step {expected.step} was its newest, then step "
            f"{run.counters.step}",
            hint="make sure that no other run writes there, and start again",
        )


def save(
    run: Run, *, to_resume: bool = False, replace_older: bool = True, background: dist.ProcessGroup | None = None
) -> None:
    """Write a checkpoint of everything that a resumed run needs, and remove checkpoints that are not to be kept.

    A save that is still in progress is waited for.

    Args:
        run: The run, between two steps.
        to_resume: The run ends early, so the optimizer state is needed whatever the configuration says.
        replace_older: Whether older checkpoints than the configuration wants to keep are removed.
        background: From `new_background_group`: return while the checkpoint is being written, as `run.pending`.

    Collective: all ranks.

    Raises:
        CheckpointError: It, or the one in progress, could not be written; earlier ones are untouched.
    """
    finish_save(run)
    learner = run.learner
    with_optimizer = run.config.checkpoint.save_optimizer or to_resume
    if run.ranks.is_main:
        _flush_metrics(run)
    pending = begin_save(
        run.folder.checkpoints,
        chunks=learner.model,
        optimizer=learner.optimizer if with_optimizer else None,
        counters=run.counters,
        config=run.config,
        layout=learner.layout,
        companions=run.companions,
        sample_order=run.trainer.sample_order.to_dict(),
        replace_older=replace_older,
        background=background,
        part=run.part,
    )
    run.pending = pending, run.counters
    if background is None:
        finish_save(run)


def finish_save(run: Run) -> None:
    """Wait for the save that is in progress, if there is one, and take note of it.

    Collective: all ranks, unless it is written in the background.

    Raises:
        CheckpointError: It could not be written. All ranks raise it.
    """
    if run.pending is None:
        return
    (save, counters), run.pending = run.pending, None
    try:
        save.wait()
    except CheckpointError as error:
        if run.departure is None:
            raise
        _clean_up_after_move(run, error)
        return
    run.saved = counters
    if run.ranks.is_main:
        record_save(run.folder, counters.step)


def _clean_up_after_move(run: Run, error: CheckpointError) -> None:
    """Give up a checkpoint whose folder was moved under the hands of its writers: a run that was moved saves again."""
    if not run.ranks.is_main:
        return
    logger.warning("%s; a later one follows at the new place", error.args[0])
    try:
        recover(run.folder.checkpoints)
    except (CheckpointError, OSError) as problem:
        logger.warning("%s may hold what is left of it: %s", run.folder.checkpoints, problem)


def save_after_skipped_step(run: Run) -> None:
    """Save a run that ends with a skipped step, on which nothing shows that the weights are sound.

    They are what the last applied update made of them, which may be lost to a passing fault, or may have been driven
    out of range by that very update. So they are saved if they are finite and new, and all older checkpoints stay.

    Collective: all ranks.

    Raises:
        TrainingError: Every step of this start was skipped, weights are not finite, or the run is complete (and saved).
        CheckpointError: It could not be written.
    """
    finish_save(run)
    if run.counters.optimizer_steps == run.resumed.optimizer_steps:
        raise TrainingError(
            f"every step of this start, {run.resumed.step + 1} to {run.step}, was skipped, because loss or gradient "
            "was not finite: there is nothing to save",
            hint=advice_after_skipped_steps(run),
        )
    if not (run.is_complete or _has_new_weights(run)):
        return
    if not _weights_are_finite(run):
        raise TrainingError(
            f"step {run.step} was skipped, and there are weights that are not finite: not saved",
            hint=advice_after_skipped_steps(run),
        )
    save(run, to_resume=True, replace_older=False)
    if run.is_complete:
        raise TrainingError(
            f"the last step, {run.step}, was skipped, so nothing shows that the weights are sound; they were saved, "
            "and all older checkpoints were kept",
            hint="raise training.train_steps by a few and start again; if that fails, move the newest checkpoint away, "
            "and the run continues from the one before",
        )
    if run.ranks.is_main:
        logger.warning(
            "step %d was skipped, so nothing shows that the weights just saved are sound: older checkpoints were kept",
            run.step,
        )


def save_before_failing(run: Run) -> None:
    """Save what is not saved yet, where the run is about to fail between two steps, and all ranks know it.

    What goes wrong here is only logged: the failure that comes is the one to be told.

    Collective: all ranks.
    """
    try:
        finish_save(run)
        if run.saved == run.counters or not _has_new_weights(run):
            return
        if not run.last_step_skipped or _weights_are_finite(run):
            save(run, to_resume=True, replace_older=not run.last_step_skipped)
    except Exception as error:  # noqa: BLE001 (whatever it is, it must not hide the first failure)
        logger.error("the steps since the last checkpoint could not be saved: %s", error)


def advice_after_skipped_steps(run: Run) -> str:
    """Say how to continue when loss or gradient stays out of range; the hint of an error."""
    remedy = "a lower optimizer.lr or a longer optimizer.lr_warmup_steps"
    if run.saved is None:
        return f"nothing has been saved in this run folder: start again with {remedy}"
    return f"the run continues from the checkpoint of step {run.saved.step}: start it again with {remedy}"


def _has_new_weights(run: Run) -> bool:
    """Whether this start has changed the weights since they were last saved."""
    known = run.saved or run.resumed
    return run.counters.optimizer_steps > known.optimizer_steps


def _weights_are_finite(run: Run) -> bool:
    """Look at all parameters that are trained, of all ranks. Collective: all ranks."""
    everything = (parameter for chunk in run.learner.model for parameter in chunk.parameters())
    parameters = (parameter for parameter in everything if parameter.requires_grad)
    is_broken = not all(bool(torch.isfinite(parameter).all()) for parameter in parameters)
    return run.ranks.maximum(int(is_broken)) == [0]


def _flush_metrics(run: Run) -> None:
    """Have the metrics on the disk before the checkpoint of their step is."""
    try:
        flush_to_disk(run.folder.metrics)
    except OSError as error:
        logger.warning("%s may lose lines: %s", run.folder.metrics, error.strerror)


def _newest_checkpoint(run: Run) -> Path | None:
    """Return what the main rank found, on all ranks: a shared file system may show it to other ranks later."""
    newest = run.opened.newest if run.opened is not None else None
    (step,) = run.ranks.maximum(-1 if newest is None else step_of(newest) or 0)
    return step_folder(run.folder.checkpoints, step) if step >= 0 else None
