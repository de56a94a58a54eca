"""What earlier starts have left in a run folder, and whether a new one can build on it.

A run that has never saved starts over. One that has saved, and whose checkpoints are not there, is refused: they may
are on a disk that is not mounted, and a new start would put a fresh run in their place.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

from megatron_7b.checkpoint.folders import LATEST, latest_checkpoint, step_of
from megatron_7b.errors import CheckpointError
from megatron_7b.files import replace_text
from megatron_7b.training.run_folder import RunFolder

logger = logging.getLogger(__name__)


def record_save(folder: RunFolder, step: int) -> None:
    """Note outside of the checkpoints folder that a step was saved, so that a later start can miss it.

    A note that cannot be written is no failure of the save.
    """
    try:
        replace_text(folder.saved, json.dumps({"step": step}) + "\n")
    except OSError as error:
        logger.warning("%s could not be written: %s", folder.saved, error.strerror)


def find_start(folder: RunFolder) -> Path | None:
    """Return the checkpoint that a start resumes from; None where nothing has been saved yet. Only reads.

    Raises:
        CheckpointError: The newest checkpoint is damaged, or checkpoints were saved and none can be found.
    """
    newest = latest_checkpoint(folder.checkpoints)
    if newest is not None:
        return newest
    traces = list(_traces_of_saves(folder))
    if traces:
        raise CheckpointError(
            f"{folder.root} has been saved before, but {folder.checkpoints} holds no checkpoint: {'; '.join(traces)}",
            hint="bring the checkpoints back (is their disk mounted?), or choose another --run-dir; to start over in "
            f"this one, move {folder.root} away first",
        )
    return None


def warn_of_lost_steps(folder: RunFolder, newest: Path) -> None:
    """Say so if a later step than that of the newest checkpoint was saved: the run will do it again."""
    saved, found = _read_json(folder.saved).get("step"), step_of(newest)
    if isinstance(saved, int) and found is not None and saved > found:
        logger.warning(
            "%s says that step %d was saved, but the newest checkpoint in %s is of step %d: the rest is done again",
            folder.saved.name, saved, folder.checkpoints, found,
        )  # fmt: skip


def _traces_of_saves(folder: RunFolder) -> Iterator[str]:
    saved = _read_json(folder.saved).get("step")
    if saved is not None:
        yield f"{folder.saved.name} says that step {saved} was saved"
    status = _read_json(folder.status)
    if status.get("state") in ("saved", "finished") and status.get("step"):
        yield f"{folder.status.name} says that step {status['step']} was saved"
    latest = folder.checkpoints / LATEST
    if latest.is_symlink():
        yield f"{latest} points to {latest.readlink()}"


def _read_json(path: Path) -> dict[str, object]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
