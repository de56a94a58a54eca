"""Worker processes that fail in every way a process can."""

import errno
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_7b.errors import DataFormatError, MegatronError
from megatron_7b.prepare.running.supervisor import run_tasks


@dataclass(frozen=True)
class Job:
    """Writes a file, unless it is told to end otherwise."""

    path: Path
    ending: str = ""

    @property
    def label(self) -> str:
        return f"job {self.path.name}"

    def run(self) -> None:
        with self.path.open("a") as file:
            file.write("tried\n")
        tries = self.path.read_text().count("tried")
        if self.ending == "killed" or (self.ending == "killed once" and tries == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.ending == "mistake":
            raise DataFormatError("a bad file", hint="mend it")
        if self.ending == "defect":
            raise ZeroDivisionError("ours")
        if self.ending == "disk full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")


def run(folder: Path, endings: list[str], workers: int = 2) -> list[int]:
    done: list[int] = []
    jobs = [Job(folder / str(index), ending) for index, ending in enumerate(endings)]
    run_tasks(jobs, num_workers=workers, on_done=done.append)
    return sorted(done)


def test_every_task_is_done_once(tmp_path: Path) -> None:
    assert run(tmp_path, [""] * 7, workers=3) == list(range(7))
    assert [(tmp_path / str(index)).read_text() for index in range(7)] == ["tried\n"] * 7
    assert run(tmp_path, []) == []


def test_a_killed_worker_costs_one_more_try(tmp_path: Path) -> None:
    """datatrove's local executor waits for such a worker for ever."""
    assert run(tmp_path, ["", "killed once", "", ""]) == [0, 1, 2, 3]
    assert (tmp_path / "1").read_text() == "tried\ntried\n"


def test_a_task_that_kills_its_workers_is_named(tmp_path: Path) -> None:
    with pytest.raises(MegatronError, match=r"job 1: its worker was killed by signal 9, 2 times") as caught:
        run(tmp_path, ["", "killed", ""])
    assert "memory" in str(caught.value)
    assert (tmp_path / "1").read_text() == "tried\ntried\n"


def test_mistakes_and_defects_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(DataFormatError, match="a bad file\nhint: mend it"):
        run(tmp_path, ["mistake"])
    with pytest.raises(MegatronError, match="job 0: .*No space left on device: 'somewhere'"):
        run(tmp_path, ["disk full"])
    with pytest.raises(RuntimeError, match=r"(?s)job 0 failed.*Traceback.*ZeroDivisionError: ours"):
        run(tmp_path, ["defect"])
