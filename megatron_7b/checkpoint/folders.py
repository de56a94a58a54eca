"""Where checkpoints are, and how one becomes visible: written under a temporary name, renamed when complete."""

import os
import re
import shutil
import uuid
from pathlib import Path

from megatron_7b.checkpoint.manifest import MANIFEST
from megatron_7b.errors import CheckpointError, PathError
from megatron_7b.runtime.durable import flush_to_disk

LATEST = "latest"
_STEP = re.compile(r"step_(\d{8,})")


def step_folder(checkpoints: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return checkpoints / f"step_{step:08d}"


def _complete_steps(checkpoints: Path) -> dict[int, Path]:
    if not checkpoints.is_dir():
        return {}
    return {
        int(match.group(1)): path
        for path in checkpoints.iterdir()
        if (match := _STEP.fullmatch(path.name)) and (path / MANIFEST).is_file()
    }


def latest_checkpoint(checkpoints: Path) -> Path | None:
    """Return the complete checkpoint of the highest step, or None if there is none."""
    steps = _complete_steps(checkpoints)
    return steps[max(steps)] if steps else None


def resolve_checkpoint(path: Path) -> Path:
    """Return the step folder meant by a step folder, `latest`, a checkpoints folder or a run folder.

    Raises:
        PathError: there is no complete checkpoint there.
    """
    if (path / MANIFEST).is_file():
        return path.resolve()
    for candidates in (path, path / "checkpoints"):
        found = latest_checkpoint(candidates)
        if found is not None:
            return found.resolve()
    what = "does not exist" if not path.exists() else "holds no complete checkpoint"
    raise PathError(
        f"{path} {what}",
        hint="name a step folder, RUN/checkpoints/latest, or a run folder with at least one checkpoint",
    )


def new_staging_folder(checkpoints: Path, step: int) -> Path:
    """Create the folder that a save writes into before it is published.

    The name is new every time, so a lingering process of an earlier life of the job writes elsewhere.
    """
    staging = checkpoints / f".tmp-step_{step:08d}-{uuid.uuid4().hex[:8]}"
    staging.mkdir(parents=True)
    return staging


def publish(staging: Path, step: int) -> Path:
    """Give a complete checkpoint its name, then point `latest` at it.

    Returns:
        The published folder.
    """
    checkpoints = staging.parent
    target = step_folder(checkpoints, step)
    if target.exists():
        replaced = checkpoints / f".tmp-replaced-{uuid.uuid4().hex[:8]}"
        target.rename(replaced)
        staging.rename(target)
        shutil.rmtree(replaced)
    else:
        staging.rename(target)
    link = checkpoints / f".tmp-{LATEST}-{uuid.uuid4().hex[:8]}"
    link.symlink_to(target.name)
    os.replace(link, checkpoints / LATEST)
    flush_to_disk(checkpoints)
    return target


def remove_leftovers(checkpoints: Path) -> None:
    """Remove what interrupted saves have left behind. Call only while no save is in progress."""
    for path in checkpoints.glob(".tmp-*"):
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)


def keep_newest(checkpoints: Path, keep_last: int) -> list[Path]:
    """Remove all but the newest checkpoints; returns what was removed. 0 keeps all."""
    steps = _complete_steps(checkpoints)
    removed = [steps[step] for step in sorted(steps)[:-keep_last]] if keep_last else []
    for path in removed:
        unwanted = checkpoints / f".tmp-removed-{path.name}"
        path.rename(unwanted)  # from here on nobody can take it for complete
        shutil.rmtree(unwanted)
    return removed


def check_free_space(folder: Path, needed_bytes: int) -> None:
    """Refuse a save that cannot fit.

    Raises:
        CheckpointError: the disk has too little room.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise CheckpointError(
            f"a checkpoint needs about {needed_bytes / 1e6:,.0f} MB, but {folder} has {free / 1e6:,.0f} MB left",
            hint="free some space, or lower checkpoint.keep_last",
        )
