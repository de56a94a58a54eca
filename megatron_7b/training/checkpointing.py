"""A run and its checkpoints: where a start begins, and what a save consists of."""

import logging
from pathlib import Path

from megatron_7b.checkpoint.folders import latest_checkpoint, remove_leftovers, resolve_checkpoint, step_folder
from megatron_7b.checkpoint.load import load_checkpoint, load_weights
from megatron_7b.checkpoint.save import save_checkpoint
from megatron_7b.errors import TrainingError
from megatron_7b.runtime.signals import StopReason
from megatron_7b.training.run import Run

logger = logging.getLogger(__name__)


def load_starting_point(run: Run) -> None:
    """Load the newest complete checkpoint of the run folder; a fresh run may start from existing weights instead.

    Collective: all ranks.

    Raises:
        CheckpointError: The checkpoint is damaged, or does not fit the model.
    """
    checkpoint, trainer = _newest_checkpoint(run), run.trainer
    verify = run.config.checkpoint.verify_on_load
    if checkpoint is not None:
        run.counters = load_checkpoint(
            checkpoint, chunks=trainer.model, optimizer=trainer.optimizer, layout=trainer.layout, verify=verify
        )
        _check_that_data_fits(run)
        return
    source = run.config.checkpoint.initialize_from
    if source is not None:
        load_weights(resolve_checkpoint(Path(source)), trainer.model, trainer.optimizer, verify=verify)
        if run.ranks.is_main:
            logger.info("starting from the weights of %s", source)


def _check_that_data_fits(run: Run) -> None:
    """Refuse a checkpoint that appeared after the data had been opened to continue from another one."""
    expected = run.trainer.progress.counters
    if run.counters != expected:
        raise TrainingError(
            f"{run.folder.checkpoints} changed during the start: step {expected.step} was its newest, then step "
            f"{run.counters.step}",
            hint="make sure that no other run writes there, and start again",
        )


def save(run: Run, *, to_resume: bool = False) -> None:
    """Write a checkpoint of everything that a resumed run needs, and remove checkpoints that are not to be kept.

    Args:
        run: Between two steps.
        to_resume: The run ends early, so the optimizer state is needed whatever the configuration says.

    Collective: all ranks.

    Raises:
        CheckpointError: It could not be written; earlier ones are untouched.
    """
    trainer = run.trainer
    with_optimizer = run.config.checkpoint.save_optimizer or to_resume or run.stop is not StopReason.NONE
    save_checkpoint(
        run.folder.checkpoints,
        chunks=trainer.model,
        optimizer=trainer.optimizer if with_optimizer else None,
        counters=run.counters,
        config=run.config,
        layout=trainer.layout,
        companions=trainer.companions,
        sample_order=trainer.sample_order.to_dict(),
    )


def _newest_checkpoint(run: Run) -> Path | None:
    """Return what the main rank finds, on all ranks: a shared file system may show it to other ranks later."""
    step = -1
    with run.ranks.together("looking for a checkpoint to resume from"):
        if run.ranks.is_main and run.folder.checkpoints.is_dir():
            remove_leftovers(run.folder.checkpoints)
            newest = latest_checkpoint(run.folder.checkpoints)
            step = int(newest.name.removeprefix("step_")) if newest is not None else -1
    (step,) = run.ranks.maximum(step)
    return step_folder(run.folder.checkpoints, step) if step >= 0 else None
