"""What becomes of a job: requeued after a save, never after `scancel`, not for ever after crashes.

A program of the trainer's contract stands for the trainer, so that a life takes a second; test_pretrain.py has the real
one. All jobs of this file are in the queue together.
"""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples"
SECONDS = 60.0  # far more than needed, on a busy machine too


def verdict(code: int, first: int, last: int, stalled: int) -> str:
    """Ask the shell library what becomes of a job whose life ended so."""
    script = f"source {EXAMPLES}/slurm/lives.sh; verdict {code} {first} {last} {stalled}"
    return subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True).stdout.strip()


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
    assert verdict(code, first, last, stalled) == expected


@dataclass(frozen=True)
class Job:
    """A submitted job and where it writes."""

    cluster: Cluster
    number: int
    run_dir: Path

    def lives(self) -> list[tuple[str, ...]]:
        """Return (first step, last step, exit code, verdict) of each life; a death by signal reads `killed`."""
        rows = [row.split("\t")[3:] for row in (self.run_dir / "slurm" / "lives.tsv").read_text().splitlines()[1:]]
        # Which signal's code srun passes on depends on which of the processes that it ends is the last.
        return [(first, last, "killed" if int(code) > 128 else code, end) for first, last, code, end in rows]

    def log(self) -> str:
        """Return what the job printed in all its lives."""
        return (self.run_dir / "log").read_text()

    def await_text(self, text: str, path: str = "log") -> None:
        """Return as soon as a file of the run folder holds `text`."""
        deadline = time.monotonic() + SECONDS
        while not (self.run_dir / path).exists() or text not in (self.run_dir / path).read_text():
            assert time.monotonic() < deadline, f"no {text!r} in {path}: {self.log()}"
            time.sleep(0.05)

    def end(self) -> str:
        """Wait for the job's end; return its state."""
        return self.cluster.wait_until_ended(self.number, SECONDS)["JobState"]


def submit(cluster: Cluster, run_dir: Path, *arguments: str, log: str = "log", **environment: str) -> Job:
    """Submit the contract trainer, one process on each of two nodes."""
    run_dir.mkdir(exist_ok=True)
    number = cluster.submit(
        *(f"--output={run_dir}/{log}", HERE / "contract.sbatch", HERE / "contract_trainer.py", *arguments),
        environment={
            "EXAMPLES": str(EXAMPLES),
            "RUN_DIR": str(run_dir),
            "PYTHON": sys.executable,
            "LAUNCHER": "srun",
            "NPROC_PER_NODE": "1",
            **environment,
        },
    )
    return Job(cluster, number, run_dir)


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """All the jobs of this file, at work side by side."""
    folder = tmp_path_factory.mktemp("lives")

    def start(name: str, *arguments: str, **environment: str) -> Job:
        return submit(cluster, folder / name, *arguments, **environment)

    return {
        "saves": start("saves", "--steps", "3", "wait"),
        "cancelled": start("cancelled", "--steps", "3", "wait"),
        "stopped for good": start("stopped", "--steps", "3", "wait"),
        "crashes at once": start("crash", "crash"),
        "crashes after progress": start("progress", "--steps", "3", "crash"),
        "never gets on": start("stalled", "quit", MAX_STALLED_LIVES="1"),
        "hangs": start("hang", "hang"),
    }


def when_waiting(job: Job) -> Job:
    """Return the job once its trainer has made its steps and installed its handlers."""
    job.await_text("step_00000003", "checkpoints/latest")
    return job


def test_a_signalled_job_saves_comes_back_and_finishes(cluster: Cluster, jobs: dict[str, Job]) -> None:
    job = when_waiting(jobs["saves"])
    cluster.run("scancel", "--batch", "--signal=USR1", str(job.number))
    assert job.end() == "COMPLETED", job.log()
    assert job.lives() == [("-1", "4", "75", "requeue"), ("4", "7", "0", "done")]


def test_processes_that_a_rank_has_spawned_survive_the_signal(jobs: dict[str, Job]) -> None:
    job = jobs["saves"]
    job.await_text("", "writer")
    assert (job.run_dir / "writer").read_text() == "SIGUSR1 alive"


def test_a_second_job_is_refused_the_run_folder_of_one_at_work(cluster: Cluster, jobs: dict[str, Job]) -> None:
    first = when_waiting(jobs["cancelled"])
    second = submit(cluster, first.run_dir, "finish", log="second")
    assert second.end() == "FAILED"
    assert cluster.job(second.number)["ExitCode"] == "2:0"
    assert f"job {first.number} trains in {first.run_dir}" in (first.run_dir / "second").read_text()


def test_a_cancelled_job_stays_cancelled_though_it_saved(cluster: Cluster, jobs: dict[str, Job]) -> None:
    job = when_waiting(jobs["cancelled"])
    cluster.run("scancel", str(job.number))
    assert job.end() == "CANCELLED", job.log()
    job.await_text("ended_by_slurm")
    assert job.lives() == [("-1", "4", "75", "ended_by_slurm")]


def test_a_job_that_may_not_be_requeued_ends_with_75(cluster: Cluster, jobs: dict[str, Job]) -> None:
    job = when_waiting(jobs["stopped for good"])
    cluster.run("scontrol", "update", f"JobId={job.number}", "Requeue=0")
    cluster.run("scancel", "--batch", "--signal=USR1", str(job.number))
    assert job.end() == "FAILED", job.log()
    assert cluster.job(job.number)["ExitCode"] == "75:0"
    assert "refused to requeue" in job.log()


def test_a_crash_without_progress_ends_the_job(cluster: Cluster, jobs: dict[str, Job]) -> None:
    job = jobs["crashes at once"]
    assert job.end() == "FAILED"
    assert job.lives() == [("-1", "-1", "killed", "fail")]
    assert cluster.job(job.number)["Restarts"] == "0"


def test_a_crash_after_progress_is_requeued_until_there_is_none(jobs: dict[str, Job]) -> None:
    job = jobs["crashes after progress"]
    assert job.end() == "FAILED"
    assert job.lives() == [("-1", "3", "killed", "requeue"), ("3", "3", "killed", "fail")]


def test_saves_without_progress_are_bounded(jobs: dict[str, Job]) -> None:
    job = jobs["never gets on"]
    assert job.end() == "FAILED"
    assert job.lives() == [("-1", "-1", "75", "requeue"), ("-1", "-1", "75", "fail")]


def test_a_trainer_deaf_to_the_signal_does_not_run_into_the_time_limit(jobs: dict[str, Job], cluster: Cluster) -> None:
    job = jobs["hangs"]
    job.await_text("newest step")
    cluster.run("scancel", "--batch", "--signal=USR1", str(job.number))
    job.await_text("told to stop")
    cluster.run("scancel", "--batch", "--signal=ALRM", str(job.number))  # rather than wait for most of two minutes
    assert job.end() == "FAILED"
    assert job.lives() == [("-1", "-1", "124", "fail")]
    assert cluster.job(job.number)["ExitCode"] == "124:0"
