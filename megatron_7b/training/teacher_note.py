"""Whom a run has learned from, noted in its folder: a run is continued with the teacher that it began with."""

import logging
from pathlib import Path

from megatron_7b.checkpoint.base import weights_identity
from megatron_7b.checkpoint.folders import resolve_checkpoint
from megatron_7b.checkpoint.manifest import read_manifest
from megatron_7b.config.schema import RunConfig
from megatron_7b.data.samples.teacher_logits import CachedLogits
from megatron_7b.errors import ConfigError
from megatron_7b.files import replace_text
from megatron_7b.training.run import Run

logger = logging.getLogger(__name__)


def keep_teacher(run: Run) -> None:
    """Note in the run folder whom a run learns from, and refuse to continue it with another teacher.

    Collective: all ranks.

    Raises:
        ConfigError: The run has learned from another one so far.
    """
    with run.ranks.together("looking for the teacher of earlier starts"):
        if run.ranks.is_main:
            _keep(run)


def _keep(run: Run) -> None:
    note, distillation = run.folder.teacher_note, run.config.distillation
    known = note.read_text(encoding="utf-8").split() if run.step > 0 and note.is_file() else []
    if not distillation.is_used:
        if known:
            logger.warning("the run has learned from the teacher %s so far, and continues without it", known[0])
        return
    identity = _identity(run.config)
    if known and known[0] != identity:
        raise ConfigError(
            f"distillation.teacher is {distillation.teacher} ({identity}), but the run has learned from another one "
            f"({known[0]}) so far",
            hint=f"name the teacher of before, choose another --run-dir, or delete {note} to change it on purpose",
        )
    replace_text(note, identity + "\n")


def _identity(config: RunConfig) -> str:
    """Return a hash of what decides what a teacher says: its weights, wherever they are, and how it computes."""
    if config.distillation.cached_logits is not None:
        return CachedLogits.read(config.distillation.cached_logits).teacher
    folder = resolve_checkpoint(Path(str(config.distillation.teacher)))
    return f"{weights_identity(read_manifest(folder))}-{config.distillation.teacher_dtype}"
