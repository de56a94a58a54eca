"""How a checkpoint becomes visible, and how others make room for it: complete under a temporary name, then renamed.

Whatever is interrupted here, at any moment and by anything, at least one complete checkpoint is left, and `recover`
puts the folder in order.
"""

import contextlib
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from megatron_7b.checkpoint.folders import LATEST, find_steps, latest_checkpoint, step_folder, step_of
from megatron_7b.checkpoint.manifest import read_manifest
from megatron_7b.errors import CheckpointError
from megatron_7b.files import flush_to_disk, remove_any

logger = logging.getLogger(__name__)

_REPLACED = re.compile(r"\.tmp-replaced-(step_\d{8,})-[0-9a-f]{8}")


def new_staging_folder(checkpoints: Path, step: int) -> Path:
    """Create the folder that a save writes into before it is published, in an existing folder of checkpoints.

    The name is new every time, so a lingering process of an earlier life of the job writes elsewhere.
    """
    staging = _temporary(checkpoints, step_folder(checkpoints, step).name)
    staging.mkdir()
    return staging


def publish(staging: Path, step: int) -> Path:
    """Give a complete checkpoint its name, then point `latest` at it.

    Returns:
        The published folder.

    Raises:
        OSError: It could not be renamed; a checkpoint of the same step is still there.
    """
    checkpoints = staging.parent
    target, replaced = step_folder(checkpoints, step), None
    for folder in (path for path in (*staging.rglob("*"), staging) if path.is_dir()):
        flush_to_disk(folder)
    if os.path.lexists(target):
        replaced = _temporary(checkpoints, f"replaced-{target.name}")
        target.rename(replaced)
    try:
        staging.rename(target)
    except OSError:
        if replaced is not None:
            replaced.rename(target)
        raise
    _point_latest_at(target)
    flush_to_disk(checkpoints)
    if replaced is not None:
        discard(replaced)
    return target


def recover(checkpoints: Path) -> None:
    """Put a folder in order after any interruption. Call only while no save is in progress.

    A checkpoint whose replacement never arrived gets its name back, what interrupted saves left is removed, and
    `latest` points to the newest checkpoint.

    Raises:
        CheckpointError: The folder cannot be read, or the newest checkpoint is damaged.
    """
    for path in checkpoints.glob(".tmp-replaced-*"):
        match = _REPLACED.fullmatch(path.name)
        if match and not os.path.lexists(checkpoints / match[1]):
            path.rename(checkpoints / match[1])
    newest = latest_checkpoint(checkpoints)
    for path in checkpoints.glob(".tmp-*"):
        discard(path)
    if newest is not None and (checkpoints / LATEST).resolve() != newest.resolve():
        _point_latest_at(newest)


def keep_newest(checkpoints: Path, keep_last: int, published: Path) -> list[Path]:
    """Remove checkpoints older than the newest ones.

    Only those count, and only those go, that are complete, are what their name says, and are not ahead of the one that
    was just published. What cannot be removed stays, with a warning: the run has been saved.

    Args:
        checkpoints: Folder of all checkpoints of the run.
        keep_last: How many to keep, `published` included; 0 keeps all.
        published: The checkpoint that was just saved.

    Returns:
        What was removed.
    """
    this = step_of(published)
    assert this is not None
    if keep_last == 0:
        return []
    steps = find_steps(checkpoints).complete
    ahead = sorted(step for step in steps if step > this)
    if ahead:
        logger.warning(
            "%s is ahead of step %d, which this run has just saved: it is left alone, and the next start would resume "
            "from it; move it away unless it is what you want", steps[ahead[-1]], this,
        )  # fmt: skip
    own = sorted(step for step, path in steps.items() if step < this and _is_what_it_says(path))
    unwanted = own[: max(0, len(own) + 1 - keep_last)]
    return [steps[step] for step in unwanted if _retire(steps[step])]


def check_free_space(folder: Path, needed_bytes: int, *, step: int) -> None:
    """Refuse a save that cannot fit.

    Args:
        folder: Where it is to be written.
        needed_bytes: What it takes.
        step: Which checkpoint it is.

    Raises:
        CheckpointError: The disk has too little room.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise CheckpointError(
            f"the checkpoint of step {step} takes about {needed_bytes / 1e6:,.1f} MB, but {folder} has "
            f"{free / 1e6:,.1f} MB left",
            hint="free some room, or lower checkpoint.keep_last",
        )


@contextlib.contextmanager
def removed_if_it_fails(staging: Path, step: int, num_bytes: int) -> Iterator[None]:
    """Leave nothing of a checkpoint that could not be written, and say so in one error, whatever a with block raises.

    Args:
        staging: Where it is written.
        step: Of the checkpoint.
        num_bytes: Size of its tensors.

    Raises:
        CheckpointError: The block failed.
    """
    try:
        yield
    except Exception as error:
        problem = describe_failure(error, staging.parent, step, num_bytes)
        discard(staging)
        raise problem from error


def describe_failure(error: Exception, checkpoints: Path, step: int, num_bytes: int) -> CheckpointError:
    """Say which checkpoint could not be written, where, why, and how much room it needs.

    Args:
        error: What was raised.
        checkpoints: The folder that was to hold it.
        step: Of the checkpoint.
        num_bytes: Size of its tensors.
    """
    room = f"it takes about {num_bytes / 1e6:,.1f} MB"
    with contextlib.suppress(OSError):
        room += f", and {shutil.disk_usage(checkpoints).free / 1e6:,.1f} MB are free there"
    return CheckpointError(
        f"the checkpoint of step {step} could not be written to {checkpoints}: {reason_in_words(error)}; {room}",
        hint="free some room or quota, if that is the reason, and give the same command again",
    )


def reason_in_words(error: Exception) -> str:
    """Return one line that says what failed, with the file that it concerns."""
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list):
        _, target, reason = error.args[0][0]
        return f"{target}: {reason}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _temporary(checkpoints: Path, name: str) -> Path:
    return checkpoints / f".tmp-{name}-{uuid.uuid4().hex[:8]}"


def _point_latest_at(folder: Path) -> None:
    """Point `latest` at a checkpoint; a file system without links, or something else of that name, is no failure."""
    latest, link = folder.parent / LATEST, _temporary(folder.parent, LATEST)
    try:
        link.symlink_to(folder.name)
        os.replace(link, latest)
    except OSError as error:
        with contextlib.suppress(OSError):
            link.unlink()
        logger.warning("%s could not be pointed at %s: %s", latest, folder.name, error.strerror)


def _is_what_it_says(folder: Path) -> bool:
    try:
        read_manifest(folder)  # which compares the folder's name
    except CheckpointError:
        return False
    return True


def _retire(folder: Path) -> bool:
    """Remove a checkpoint, of which from the first moment on nobody can take the rest for complete."""
    unwanted = _temporary(folder.parent, f"removed-{folder.name}")
    try:
        folder.rename(unwanted)
    except OSError as error:
        logger.warning("the old checkpoint %s could not be removed: %s", folder, error.strerror)
        return False
    discard(unwanted)
    return True


def discard(path: Path) -> None:
    """Remove what nobody needs any more; what cannot be removed stays, with a warning, for the next start."""
    try:
        remove_any(path)
    except OSError as error:
        logger.warning("%s could not be removed: %s", path, error)
