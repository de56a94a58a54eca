"""What becomes of a job: requeued after a save, never after `scancel`, not for ever after crashes.

A program of the trainer's contract stands for the trainer, so that a life takes a second; test_pretrain.py has the real
one.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Job

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples"

Submit = Callable[..., Job]


def call(function: str, *arguments: object, **environment: str) -> str:
    """Return what a function of the shell library prints."""
    script = f"source {EXAMPLES}/slurm/lives.sh; {function} {' '.join(map(str, arguments))}"
    completed = subprocess.run(
        ["bash", "-euc", script], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return completed.stdout.strip()


@pytest.mark.parametrize(
    ("code", "first", "last", "stalled", "expected"),
    [
        (0, -1, 10, 0, "done"),
        (0, 10, 10, 5, "done"),
        (75, -1, 4, 0, "requeue"),
        (75, 4, 4, 0, "requeue"),
        (75, 4, 4, 1, "requeue"),
        (75, 4, 4, 2, "fail"),
        (1, -1, -1, 0, "fail"),
        (2, -1, -1, 0, "fail"),
        (137, 100, 200, 0, "requeue"),
        (137, 200, 200, 0, "fail"),
        (124, 100, 200, 0, "requeue"),
        (124, 200, 200, 0, "fail"),
    ],
)
def test_a_job_comes_back_after_a_save_or_progress(
    code: int, first: int, last: int, stalled: int, expected: str
) -> None:
    assert call("verdict", code, first, last, stalled) == expected


@pytest.mark.parametrize(
    ("status", "srun_code", "expected"),
    [
        ('{"state": "saved", "exit_code": 75, "step": 4}', 1, "75"),  # torchrun's 1
        ('{"state": "saved", "exit_code": 75, "step": 4}', 143, "75"),  # srun ended the slower ranks
        ('{"state": "failed", "exit_code": 2, "step": 0}', 1, "2"),
        ('{"state": "running", "exit_code": null, "step": 4}', 137, "137"),  # had no time to say anything
        ('{"state": "finished", "exit_code": 0, "step": 9}', 1, "1"),  # another rank failed after that
        ('{"state": "finished", "exit_code": 0, "step": 9}', 0, "0"),
        (None, 143, "143"),
    ],
)
def test_what_the_trainer_wrote_counts_more_than_what_the_launcher_returned(
    status: str | None, srun_code: int, expected: str, tmp_path: Path
) -> None:
    if status is not None:
        (tmp_path / "status.json").write_text(status)
    assert call("trainer_exit_code", srun_code, RUN_DIR=str(tmp_path)) == expected


def test_the_newest_checkpoint_is_found_behind_a_link_or_in_a_file(tmp_path: Path) -> None:
    assert call("latest_step", RUN_DIR=str(tmp_path)) == "-1"
    (tmp_path / "checkpoints").mkdir()
    latest = tmp_path / "checkpoints" / "latest"
    latest.symlink_to("step_00000089")
    assert call("latest_step", RUN_DIR=str(tmp_path)) == "89"
    latest.unlink()
    latest.write_text("step_00000090\n")
    assert call("latest_step", RUN_DIR=str(tmp_path)) == "90"


@pytest.fixture
def submit(cluster: Cluster, tmp_path: Path) -> Submit:
    """A function that submits the contract trainer, one process on each of two nodes."""

    def submit(*arguments: str, log: str = "log", **environment: str) -> Job:
        number = cluster.submit(
            *(f"--output={tmp_path}/{log}", HERE / "contract.sbatch", HERE / "contract_trainer.py", *arguments),
            environment={
                "EXAMPLES": str(EXAMPLES),
                "RUN_DIR": str(tmp_path),
                "PYTHON": sys.executable,
                "LAUNCHER": "srun",
                "NPROC_PER_NODE": "1",
                **environment,
            },
        )
        return Job(cluster, number, tmp_path, tmp_path / log)

    return submit


def when_waiting(job: Job) -> Job:
    """Return the job once its trainer has made its steps and installed its handlers."""
    job.wait_until((job.run_dir / "checkpoints" / "latest").exists, "the first checkpoint")
    return job


def test_a_signalled_job_saves_comes_back_and_finishes(submit: Submit) -> None:
    job = when_waiting(submit("--steps", "3", "wait"))
    job.signal_script("USR1")
    assert job.end() == "COMPLETED", job.log
    assert job.lives == [("-1", "4", "75", "requeue"), ("4", "7", "0", "done")]
    # Only rank 0 itself was signalled: what it has spawned to write a checkpoint would not survive it.
    assert (job.run_dir / "writer").read_text() == "SIGUSR1 alive"


def test_a_trainer_that_is_signalled_before_it_listens_is_signalled_again(submit: Submit) -> None:
    job = submit("--steps", "3", "wait", STOP_REPEAT_SECONDS="1")
    job.wait_until(lambda: "newest step" in job.log, "the start of the script")
    job.signal_script("USR1")
    assert job.end() == "COMPLETED", job.log
    assert [life[2:] for life in job.lives] == [("75", "requeue"), ("0", "done")]


def test_a_cancelled_job_stays_cancelled_though_it_saved(submit: Submit) -> None:
    job = when_waiting(submit("--steps", "3", "wait"))
    job.cancel()
    assert job.end() == "CANCELLED", job.log
    job.wait_until(lambda: "ended_by_slurm" in job.log, "the script's last word")
    assert job.lives == [("-1", "4", "75", "ended_by_slurm")]


def test_a_second_job_is_refused_the_run_folder_of_one_at_work(submit: Submit) -> None:
    first = when_waiting(submit("--steps", "3", "wait"))
    second = submit("finish", log="second")
    assert second.end() == "FAILED"
    assert second.fields["ExitCode"] == "2:0"
    assert f"job {first.number} trains in {first.run_dir}" in second.log
    first.cancel()
    # It waits for the first to be out of the way, and then resumes.
    assert submit("finish", log="third").end() == "COMPLETED"
    assert first.lives[-1] == ("4", "4", "0", "done")


def test_a_job_that_may_not_be_requeued_ends_with_75(submit: Submit) -> None:
    job = when_waiting(submit("--steps", "3", "wait"))
    job.update("Requeue=0")
    job.signal_script("USR1")
    assert job.end() == "FAILED", job.log
    assert job.fields["ExitCode"] == "75:0"
    assert "refused to requeue" in job.log


def test_a_crash_without_progress_ends_the_job(submit: Submit) -> None:
    job = submit("crash")
    assert job.end() == "FAILED"
    assert job.lives == [("-1", "-1", "killed", "fail")]
    assert job.fields["Restarts"] == "0"


def test_a_crash_after_progress_is_requeued_until_there_is_none(submit: Submit) -> None:
    job = submit("--steps", "3", "crash")
    assert job.end() == "FAILED"
    assert job.lives == [("-1", "3", "killed", "requeue"), ("3", "3", "killed", "fail")]


def test_saves_without_progress_are_bounded(submit: Submit) -> None:
    job = submit("quit", MAX_STALLED_LIVES="1")
    assert job.end() == "FAILED"
    assert job.lives == [("-1", "-1", "75", "requeue"), ("-1", "-1", "75", "fail")]


def test_a_trainer_deaf_to_the_signal_does_not_run_into_the_time_limit(submit: Submit) -> None:
    job = submit("hang")
    job.wait_until(lambda: "newest step" in job.log, "the start of the script")
    job.signal_script("USR1")
    job.wait_until(lambda: "told to stop" in job.log, "the first signal")
    job.signal_script("ALRM")  # rather than wait for most of two minutes
    assert job.end() == "FAILED"
    assert job.lives == [("-1", "-1", "124", "fail")]
    assert job.fields["ExitCode"] == "124:0"
