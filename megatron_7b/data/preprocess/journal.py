"""`PREFIX.journal`: how far a run has come, so that the same command continues where a killed one stopped.

A line of JSON for the job, then one for every checkpoint, then one that says that all is written and only names are to
be given. Nothing waits for the disk: a checkpoint holds hashes of all that was written before, and whoever continues
compares them, taking the last one that the files still bear out. So a killed process costs the work since its last
checkpoint, a power cut what the kernel had not written, and neither costs a wrong byte.

The journal is locked while its run lives; a second process that wants to write the same output is refused.
"""

import errno
import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import xxhash

from megatron_7b.errors import ConfigError

type Entry = dict[str, Any]
"""A checkpoint as the journal has it."""

_FORMAT = 1


class Journal:
    """The journal of one run; a context manager that holds its lock."""

    def __init__(self, path: Path, job: Mapping[str, Any]) -> None:
        """Open and lock it, or begin one.

        Args:
            path: Of the file.
            job: All that decides what the run writes, by names that a user understands; values as JSON has them.

        Raises:
            ConfigError: Another process holds it.
        """
        self.path = path
        self._job: Entry = json.loads(json.dumps(job))
        self._file = _open_locked(path)
        self._lines = _read_lines(self._file)
        self._header: Entry = self._lines[0][0] if self._lines else {}
        self.needs_reference = bool(self._header.get("needs_reference"))
        """Whether this run, or the killed one, has found the fast engine wrong."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the lock back; a journal without content goes."""
        status = os.fstat(self._file.fileno())
        if status.st_nlink and status.st_size == 0:
            self.path.unlink()
        self._file.close()

    @property
    def job_hash(self) -> str:
        """Of the job, for the manifest."""
        return hash_job(self._job)

    @property
    def is_begun(self) -> bool:
        """Whether a run was here before."""
        return bool(self._header)

    @property
    def is_complete(self) -> bool:
        """Whether everything is written, and perhaps already has its name."""
        return bool(self._lines) and "complete" in self._lines[-1][0]

    @property
    def entries(self) -> list[Entry]:
        """Checkpoints, the oldest first."""
        return [line for line, _ in self._lines[1:] if "complete" not in line]

    def find_differences(self) -> list[str]:
        """Return what sets the run that was here before apart from this one, in words; nothing if that was the same."""
        if not self._header:
            return []
        if self._header.get("journal") != _FORMAT:
            return ["the journal's format"]
        former: Entry = self._header["job"]
        return [
            _describe_difference(name, former.get(name), self._job.get(name))
            for name in {**self._job, **former}
            if former.get(name) != self._job.get(name)
        ]

    def clear(self) -> None:
        """Forget whatever was here."""
        self._header, self._lines = {}, []
        os.ftruncate(self._file.fileno(), 0)

    def begin(self) -> None:
        """Forget whatever was here, and note this job."""
        self.clear()
        self._header = {"journal": _FORMAT, "needs_reference": self.needs_reference, "job": self._job}
        self.append(self._header)

    def keep(self, num_entries: int) -> None:
        """Forget the checkpoints after the first ones."""
        self._lines = self._lines[: 1 + num_entries]
        os.ftruncate(self._file.fileno(), self._lines[-1][1])

    def append(self, entry: Entry) -> None:
        """Note a checkpoint: one write, which a kill cannot cut in two."""
        line = json.dumps(entry, ensure_ascii=False, separators=(",", ":")).encode(errors="backslashreplace") + b"\n"
        os.write(self._file.fileno(), line)
        self._lines.append((entry, (self._lines[-1][1] if self._lines else 0) + len(line)))
        del self._lines[1:-1]  # a long run's own are of no further use to it

    def complete(self) -> None:
        """Note, on the disk, that all files are there in full under their temporary names."""
        self.append({"complete": True})
        os.fsync(self._file.fileno())

    def remove(self) -> None:
        """Remove all that could be continued."""
        self.path.unlink(missing_ok=True)
        self._header, self._lines = {}, []


def hash_job(job: Mapping[str, Any]) -> str:
    """Return a hash that is the same for the same job."""
    return xxhash.xxh3_128_hexdigest(json.dumps(job, sort_keys=True).encode())


def _open_locked(path: Path) -> Any:
    while True:
        file = path.open("a+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                file.close()
                raise ConfigError(
                    f"another process is writing this output: it holds {path}",
                    hint="wait for it or end it, or choose another --output-prefix",
                ) from None
            # Some network file systems know no locks; without one, two processes at once are the user's business.
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # its former owner finished, and removed it, between our opening and our lock


def _read_lines(file: Any) -> list[tuple[Entry, int]]:
    """Return the whole lines with where each ends, without what a power cut may have left after them."""
    file.seek(0)
    lines: list[tuple[Entry, int]] = []
    end = 0
    for line in file.read().splitlines(keepends=True):
        end += len(line)
        try:
            lines.append((json.loads(line if line.endswith(b"\n") else b""), end))
        except ValueError:
            break
    return lines


def _describe_difference(name: str, former: object, ours: object) -> str:
    if isinstance(former, Sequence) and isinstance(ours, Sequence) and not isinstance(former, str):
        if len(former) != len(ours):
            return f"{name}: {len(former)} there, {len(ours)} here"
        former, ours = next((one, other) for one, other in zip(former, ours, strict=True) if one != other)
    if isinstance(former, Mapping) and isinstance(ours, Mapping):
        path = former.get("path")
        part = next(part for part in ours if former.get(part) != ours[part])
        name = f"{name}: {part}" if part == "path" else f"{name}: {part} of {path}"
        former, ours = former.get(part), ours[part]
    return f"{name}: {former} there, {ours} here"
