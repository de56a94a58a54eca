"""Where checkpoints are: the folders of a run's steps, which of them are complete, and which one a path means.

A save writes into `.tmp-…` and renames it when complete (`publishing`), so an interrupted save never leaves a folder of
a step. Such a folder without a manifest is damaged, and is refused rather than passed over: whoever asked for the
newest checkpoint would silently get an older one, or none.
"""

import dataclasses
import re
from pathlib import Path

from megatron_7b.checkpoint.manifest import MANIFEST
from megatron_7b.errors import CheckpointError, PathError

LATEST = "latest"
_STEP = re.compile(r"step_(\d{8,})")


def step_folder(checkpoints: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return checkpoints / f"step_{step:08d}"


def step_of(folder: Path) -> int | None:
    """Return the step whose checkpoint a folder's name says it is; None for any other name."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match and step_folder(folder.parent, int(match[1])) == folder else None


@dataclasses.dataclass(frozen=True)
class StepFolders:
    """The folders of steps in a checkpoints folder, by step."""

    complete: dict[int, Path] = dataclasses.field(default_factory=dict)
    damaged: dict[int, Path] = dataclasses.field(default_factory=dict)
    """Those without a manifest."""


def find_steps(checkpoints: Path) -> StepFolders:
    """List the folders of steps; there are none if there is no checkpoints folder yet.

    Raises:
        CheckpointError: The folder is a link that leads nowhere, or cannot be read, so what it holds is not known.
    """
    found = StepFolders()
    try:
        for path in checkpoints.iterdir():
            step = step_of(path)
            if step is not None:
                (found.complete if (path / MANIFEST).is_file() else found.damaged)[step] = path
    except FileNotFoundError as error:
        if checkpoints.is_symlink():
            raise CheckpointError(
                f"{checkpoints} points to {checkpoints.readlink()}, which is not there",
                hint="mount the disk that it is on, or correct the link",
            ) from error
    except OSError as error:
        what = "is no folder" if isinstance(error, NotADirectoryError) else f"cannot be read: {error.strerror}"
        raise CheckpointError(
            f"{checkpoints} {what}; expected a folder of checkpoints that may be read",
            hint="make it readable, or move it away",
        ) from error
    return found


def latest_checkpoint(checkpoints: Path) -> Path | None:
    """Return the checkpoint of the highest step, or None if there is none.

    Raises:
        CheckpointError: It is damaged, or the folder cannot be read.
    """
    steps = find_steps(checkpoints)
    newest = max((*steps.complete, *steps.damaged), default=None)
    if newest in steps.damaged:
        raise _damage(steps.damaged[newest], steps)
    return steps.complete[newest] if newest is not None else None


def resolve_checkpoint(path: Path) -> Path:
    """Return the step folder meant by a step folder, `latest`, a checkpoints folder or a run folder.

    Raises:
        PathError: There is no complete checkpoint there.
        CheckpointError: The newest is damaged, or the folder cannot be read.
    """
    if (path / MANIFEST).is_file():
        return path.resolve()
    if path.is_symlink() and not path.exists():
        what = f"points to {path.readlink()}, which is not there"
    elif not path.exists():
        what = "does not exist"
    elif not path.is_dir():
        what = "is no folder"
    elif step_of(path.resolve()) is not None:
        raise _damage(path.resolve(), find_steps(path.resolve().parent))
    else:
        for candidates in (path, path / "checkpoints"):
            found = latest_checkpoint(candidates)
            if found is not None:
                return found.resolve()
        what = "holds no complete checkpoint"
    hint = "name a step folder, RUN/checkpoints/latest, or a run folder with at least one checkpoint"
    if (path / "config.json").is_file():
        hint = f"it looks like a Hugging Face folder, of which `megatron-7b convert from-hf --input {path}` makes one"
    raise PathError(f"{path} {what}", hint=hint)


def _damage(folder: Path, steps: StepFolders) -> CheckpointError:
    """Say of a step's folder without manifest what it is, and which checkpoint is left."""
    left = f"the newest complete one is {steps.complete[max(steps.complete)]}" if steps.complete else "no other is here"
    return CheckpointError(
        f"{folder} is damaged: it has no {MANIFEST}, which no interrupted save leaves (only .tmp-… folders)",
        hint=f"restore it, or move it away: {left}",
    )
