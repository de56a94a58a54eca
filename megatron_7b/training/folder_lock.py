"""Who may write to a run folder: one run at a time, and only while the folder is where it was."""

import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import TextIO

from megatron_7b.errors import TrainingError

logger = logging.getLogger(__name__)

_SECONDS_TO_READ_HOLDER = 1.0
"""Another run that has just taken the lock may not have written down who it is."""


class FolderLock:
    """A run's hold on its folder, which ends with the process, however that ends.

    A file system without locks is used without one. An earlier life of the same Slurm job does not count as another
    run: its processes may linger on a node that Slurm has given up.
    """

    def __init__(self, root: Path) -> None:
        """Take the lock.

        Args:
            root: The run folder, which exists.

        Raises:
            OSError: The folder cannot be written to.
            TrainingError: Another run is writing to it.
        """
        self._place = root.resolve()
        self.root = root if root.absolute() == self._place else self._place
        """The folder without links, which may lead elsewhere later."""
        self._path = root / ".lock"
        self._file = self._path.open("a+", encoding="utf-8")
        try:
            _claim(root, self._file)
            self._folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Let others write to the folder."""
        os.close(self._folder)
        self._file.close()

    def find_folder(self) -> Path | None:
        """Return where the folder is by now: where it was, where it has been moved to, or None if it was deleted.

        A file system that cannot be asked at the moment, or whose file numbers are not stable, counts as unmoved.
        """
        if self._holds(self.root):
            return self.root
        now = self._path_of_folder()
        if now == self._place:
            return self.root
        return now if now is not None and self._holds(now) else None

    def _holds(self, root: Path) -> bool:
        """Return whether the lock that we hold is the one in a folder."""
        try:
            return os.path.samestat((root / self._path.name).stat(), os.fstat(self._file.fileno()))
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True

    def _path_of_folder(self) -> Path | None:
        """Ask the kernel (Linux) what the folder that we hold open is called; None if it has no name any more."""
        try:
            now = Path(f"/proc/self/fd/{self._folder}").readlink()
        except OSError:
            return None
        return now if now.is_dir() else None


def _claim(root: Path, lock: TextIO) -> None:
    own_job = os.environ.get("SLURM_JOB_ID")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _refuse_unless_same_job(root, _read_holder(lock), own_job)
    except OSError as error:
        logger.warning(
            "%s does not support file locks (%s): make sure that only one run writes there", root, error.strerror
        )
    lock.truncate(0)
    lock.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "slurm_job": own_job}))
    lock.flush()


def _read_holder(lock: TextIO) -> dict[str, object]:
    deadline = time.monotonic() + _SECONDS_TO_READ_HOLDER
    while True:
        lock.seek(0)
        try:
            holder = json.loads(lock.read())
        except ValueError:
            holder = None
        if isinstance(holder, dict) or time.monotonic() > deadline:
            return holder or {}
        time.sleep(0.05)


def _refuse_unless_same_job(root: Path, holder: dict[str, object], own_job: str | None) -> None:
    process = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
    if own_job is not None and holder.get("slurm_job") == own_job:
        logger.warning("%s, of an earlier life of this job, still lingers", process)
        return
    raise TrainingError(
        f"another run is writing to {root}: {process}",
        hint="wait until it has ended, stop it with SIGTERM (it saves first), or choose another --run-dir",
    )
