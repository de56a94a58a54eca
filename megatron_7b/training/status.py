"""status.json: what it says while a run works, and how it becomes true after an end that the run could not record.

The main rank writes it: `running` with the last step done, and at the end how it ended. If the main rank is killed, the
launcher corrects it. If the launcher is killed too, nobody is left to: a status of `running` in a folder whose `.lock`
nobody holds belongs to a run that ended without a word, and the next start says so.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
from pathlib import Path

from megatron_7b.runtime.process.signals import EXIT_FINISHED, EXIT_SAVED, StopReason
from megatron_7b.training.run_folder import RunFolder, RunState, write_status

_BYTES_OF_METRICS = 64 * 1024
"""From the end of metrics.jsonl, in which its last step is looked for."""


def read_status(folder: RunFolder) -> dict[str, object]:
    """Return what status.json says; empty if there is none, or it cannot be read."""
    try:
        status = json.loads(folder.status.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


def record_status(folder: RunFolder, state: RunState, *, exit_code: int | None, step: int) -> None:
    """Record the state of the run as `write_status` does, even on a full disk.

    Raises:
        OSError: It could not be written.
    """
    try:
        write_status(folder, state, exit_code=exit_code, step=step)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not folder.status.exists():
            raise
        _write(folder.status, state, exit_code, step)  # in place: the block that it has is enough


def note_step(folder: RunFolder, step: int) -> None:
    """Record a step of a run at work, for readers of the moment: without waiting for the disk, and if there is room."""
    beside = folder.status.with_name(f".{folder.status.name}.step.tmp")
    with contextlib.suppress(OSError):
        _write(beside, "running", None, step)
        os.replace(beside, folder.status)


def last_step(folder: RunFolder) -> int:
    """Return the last step that metrics.jsonl tells of; 0 if there is none."""
    try:
        with folder.metrics.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _BYTES_OF_METRICS))
            lines = file.read().splitlines(keepends=True)
    except OSError:
        return 0
    for line in reversed(lines):
        with contextlib.suppress(ValueError, TypeError, KeyError):
            if line.endswith(b"\n"):
                return int(json.loads(line)["step"])
    return 0


def stop_before_first_step(folder: RunFolder, reason: StopReason, *, is_main: bool) -> str:
    """Record that this start was asked to stop before its first step, and return what to tell the user.

    Other starts' folders are left alone: nothing is recorded in one that another process is writing to.
    """
    if is_main and folder.root.is_dir() and not _in_use(folder):
        with contextlib.suppress(OSError):
            record_status(folder, "stopped", exit_code=EXIT_SAVED, step=last_step(folder))
    begun = any(folder.checkpoints.glob("step_*"))
    found = (
        "nothing new to save; the same command continues" if begun else "nothing to save; the same command starts again"
    )
    return f"stopped by {reason.name} before the first step: {found}"


class StatusWatch:
    """For a launcher: makes status.json true once all ranks have ended."""

    def __init__(self, folder: RunFolder) -> None:
        """Take note of what is there before the ranks start."""
        self._folder = folder
        self._before = self._stamp()

    def correct(self, exit_code: int) -> None:
        """Record how the start ended, unless it has done so itself, or was refused before it took the folder.

        Args:
            exit_code: What the launcher returns.
        """
        folder, status = self._folder, read_status(self._folder)
        was_stopped = exit_code == EXIT_SAVED
        untouched = self._stamp() == self._before and status.get("state") != "running"
        if not folder.root.is_dir() or (untouched and not was_stopped) or status.get("exit_code") == exit_code:
            return
        if _in_use(folder):  # by another run, or by ranks on other nodes
            return
        state: RunState = "stopped" if was_stopped else "finished" if exit_code == EXIT_FINISHED else "failed"
        with contextlib.suppress(OSError):
            record_status(folder, state, exit_code=exit_code, step=last_step(folder))

    def _stamp(self) -> tuple[int, int] | None:
        try:
            status = self._folder.status.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns


def _in_use(folder: RunFolder) -> bool:
    """Return whether another process holds the folder's lock."""
    try:
        with (folder.root / ".lock").open("r", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = json.loads(lock.read() or "{}")
                return (holder.get("host"), holder.get("pid")) != (socket.gethostname(), os.getpid())
    except (OSError, ValueError):  # never locked, or a file system without locks
        return False
    return False


def _write(path: Path, state: RunState, exit_code: int | None, step: int) -> None:
    text = json.dumps({"state": state, "exit_code": exit_code, "step": step}) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        os.pwrite(descriptor, text.encode(), 0)
        os.ftruncate(descriptor, len(text))
    finally:
        os.close(descriptor)
