"""status.json: true while a run works, and after every kind of end."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_7b.config.schema import RunConfig
from megatron_7b.runtime.process.signals import StopReason
from megatron_7b.training.opening import open_folder
from megatron_7b.training.run_folder import RunFolder
from megatron_7b.training.status import (
    StatusWatch,
    last_step,
    note_step,
    read_status,
    record_status,
    stop_before_first_step,
)
from tests.support.small_disk import small_disk


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.root.mkdir()
    return folder


def status(state: str, exit_code: int | None, step: int) -> dict[str, object]:
    return {"state": state, "exit_code": exit_code, "step": step}


def with_steps(folder: RunFolder, *steps: int, end: str = "") -> RunFolder:
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in steps]
    folder.metrics.write_text("".join(lines) + end)
    return folder


@pytest.mark.parametrize("end", ["", '{"step": 4, "lo', '{"step": 4, "loss": 1.0}', "\0\0\n", "[4]\n", '{"loss": 1}\n'])
def test_the_last_step_is_that_of_the_last_whole_line(folder: RunFolder, end: str) -> None:
    assert last_step(with_steps(folder, 1, 2, 3, end=end)) == 3


def test_the_last_step_of_a_long_run_is_read_from_its_end(folder: RunFolder) -> None:
    assert last_step(with_steps(folder, *range(1, 20_000))) == 19_999


def test_a_run_without_metrics_has_done_no_step(folder: RunFolder) -> None:
    assert last_step(folder) == 0
    assert last_step(with_steps(folder)) == 0


def test_each_step_is_noted_in_a_whole_file(folder: RunFolder) -> None:
    record_status(folder, "running", exit_code=None, step=0)
    with folder.status.open() as reader:
        note_step(folder, 7)
        assert json.load(reader) == status("running", None, 0)
    assert read_status(folder) == status("running", None, 7)
    assert [path.name for path in folder.root.iterdir()] == ["status.json"]


def test_a_step_that_cannot_be_noted_ends_nothing(tmp_path: Path) -> None:
    note_step(RunFolder(tmp_path / "gone"), 7)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\0\0"])
def test_a_status_that_says_nothing_is_none(folder: RunFolder, text: str) -> None:
    folder.status.write_text(text)
    assert read_status(folder) == {}


# What the ranks have left in status.json, the exit code of the launcher, and what is right.
CORRECTIONS = [
    (("running", None, 1), 137, ("failed", 137, 5)),  # rank 0 was killed
    (("failed", 1, 5), 137, ("failed", 137, 5)),  # rank 0 reports what followed from rank 1
    (("saved", 75, 5), 75, ("saved", 75, 5)),
    (("finished", 0, 5), 0, ("finished", 0, 5)),
    (("finished", 0, 5), 137, ("failed", 137, 5)),  # killed on its way out
    (("stopped", 75, 5), 75, ("stopped", 75, 5)),
    (("running", None, 1), 75, ("stopped", 75, 5)),  # rank 0 was not the one that was asked
    (("running", None, 1), 130, ("failed", 130, 5)),
]


@pytest.mark.parametrize(("left", "exit_code", "right"), CORRECTIONS)
def test_the_launcher_corrects_what_the_ranks_left(
    folder: RunFolder, left: tuple[str, int | None, int], exit_code: int, right: tuple[str, int | None, int]
) -> None:
    watch = StatusWatch(with_steps(folder, 1, 2, 3, 4, 5))
    record_status(folder, *left[:1], exit_code=left[1], step=left[2])  # type: ignore[arg-type]
    watch.correct(exit_code)
    assert read_status(folder) == status(*right)


def test_a_start_that_was_refused_leaves_the_last_status_alone(folder: RunFolder) -> None:
    record_status(folder, "finished", exit_code=0, step=5)
    StatusWatch(folder).correct(2)
    assert read_status(folder) == status("finished", 0, 5)


def test_a_start_that_was_stopped_while_it_was_built_says_so(folder: RunFolder) -> None:
    record_status(with_steps(folder, 1, 2), "saved", exit_code=75, step=2)
    record_status(folder, "failed", exit_code=1, step=2)
    StatusWatch(folder).correct(75)
    assert read_status(folder) == status("stopped", 75, 2)


def test_no_folder_is_made_for_a_status(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "none")
    StatusWatch(folder).correct(137)
    stop_before_first_step(folder, StopReason.SIGTERM, is_main=True)
    assert not folder.root.exists()


HOLDER = """
import sys
from collections.abc import Iterator
from pathlib import Path
from megatron_7b.config.schema import RunConfig
from megatron_7b.training.opening import open_folder
from megatron_7b.training.run_folder import RunFolder
with open_folder(RunFolder(Path(sys.argv[1])), RunConfig()):
    print("holding", flush=True)
    sys.stdin.read()
"""


def test_the_status_of_another_run_is_its_own(folder: RunFolder) -> None:
    """A second start in a folder in use, refused or stopped, says nothing about the first."""
    record_status(folder, "running", exit_code=None, step=3)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder.root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holding\n"
        StatusWatch(folder).correct(1)
        stop_before_first_step(folder, StopReason.SIGTERM, is_main=True)
        assert read_status(folder) == status("running", None, 3)
        holder.communicate("")
    StatusWatch(folder).correct(1)
    assert read_status(folder) == status("failed", 1, 0)


def test_before_the_first_step_there_is_nothing_to_save(folder: RunFolder) -> None:
    with open_folder(folder, RunConfig()):  # this process holds it already, or has not come that far
        words = stop_before_first_step(folder, StopReason.SIGHUP, is_main=True)
    assert words == "stopped by SIGHUP before the first step: nothing to save; the same command starts again"
    assert read_status(folder) == status("stopped", 75, 0)


def test_before_the_first_step_of_a_resumed_run_there_is_nothing_new_to_save(folder: RunFolder) -> None:
    (folder.checkpoints / "step_00000004").mkdir(parents=True)
    words = stop_before_first_step(with_steps(folder, 1, 2, 3, 4), StopReason.SIGINT, is_main=True)
    assert words == "stopped by SIGINT before the first step: nothing new to save; the same command continues"
    assert read_status(folder) == status("stopped", 75, 4)


def test_only_the_main_rank_records(folder: RunFolder) -> None:
    stop_before_first_step(folder, StopReason.SIGTERM, is_main=False)
    assert not folder.status.exists()


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 64) as disk:
        yield disk


def fill(disk: Path) -> None:
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
        while filler.write(bytes(4096)):
            pass


def test_the_status_is_told_on_a_full_disk(full_disk: Path) -> None:
    folder = RunFolder(full_disk / "run")
    folder.root.mkdir()
    record_status(folder, "running", exit_code=None, step=0)
    fill(full_disk)
    note_step(folder, 1234567)  # if there is room: never at the price of the step
    record_status(folder, "failed", exit_code=1, step=1234567)
    assert read_status(folder) == status("failed", 1, 1234567)
    record_status(folder, "finished", exit_code=0, step=8)  # shorter
    assert folder.status.read_text() == json.dumps(status("finished", 0, 8)) + "\n"


def test_a_first_status_that_does_not_fit_is_an_error(full_disk: Path) -> None:
    fill(full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        record_status(RunFolder(full_disk), "running", exit_code=None, step=0)
