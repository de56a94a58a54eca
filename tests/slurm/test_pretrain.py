"""The whole of examples/pretrain_7b.sh with the real trainer on two nodes: stop, requeue, resume, finish."""

import json
import sys
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest

from megatron_7b.cli.main import main as megatron_7b
from tests.slurm.cluster import Cluster
from tests.support.assets import asset

SCRIPT = Path(__file__).parents[2] / "examples" / "pretrain_7b.sh"
SECONDS = 240.0  # of a busy machine; a quiet one needs a quarter
STEPS = 3

# So small that a step takes a few hundredths of a second; the time goes into starting the processes.
MODEL = "--model.num-layers 2 --model.hidden-size 64 --model.ffn-hidden-size 128 --data.seq-length 64"
BATCH = "--training.micro-batch-size 2 --training.global-batch-size 4 --training.eval-steps 1 --data.num-workers 0"
OUTPUTS = "--telemetry.tensorboard False --telemetry.plot False --precision.params-dtype fp32"


@dataclass(frozen=True)
class Job:
    """A submitted training job and its run folder."""

    cluster: Cluster
    number: int
    run_dir: Path
    config: Path

    def log(self) -> str:
        """Return what the job printed in all its lives."""
        log = self.run_dir.with_suffix(".log")
        return log.read_text() if log.exists() else ""

    def status(self) -> dict[str, object]:
        """Return what the trainer wrote about its end."""
        return json.loads((self.run_dir / "status.json").read_text())

    def lives(self) -> list[tuple[str, ...]]:
        """Return (first step, last step, exit code, verdict) of each life."""
        rows = (self.run_dir / "slurm" / "lives.tsv").read_text().splitlines()[1:]
        return [tuple(row.split("\t")[3:]) for row in rows]

    def trained_steps(self) -> list[int]:
        """Return the steps of metrics.jsonl, in its order."""
        path = self.run_dir / "metrics.jsonl"
        lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
        return [line["step"] for line in lines if "loss" in line]

    def end(self) -> str:
        """Wait for the job's end; return its state."""
        return self.cluster.wait_until_ended(self.number, SECONDS)["JobState"]


def write_steps(config: Path, steps: int) -> None:
    """Say how long a run is, in a file that later lives read again."""
    config.write_text(f"training: {{train_steps: {steps}}}\n")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of a few speeches as bytes, by the project's own preprocessing."""
    folder = tmp_path_factory.mktemp("corpus")
    with asset("sotu.jsonl").open(encoding="utf-8") as documents:
        (folder / "few.jsonl").write_text("".join(islice(documents, 8)), encoding="utf-8")
    files = ["--input", str(folder / "few.jsonl"), "--output-prefix", str(folder / "few")]
    assert megatron_7b(["preprocess", *files, "--tokenizer-model", "bytes", "--append-eod", "--workers", "1"]) == 0
    return folder / "few_text_document"


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """The jobs of this file, in the queue together: while one waits for its time limit, the others use the cores."""
    folder = tmp_path_factory.mktemp("runs")
    environment = {"OVERRIDES": f"{MODEL} {BATCH} {OUTPUTS}", "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}

    def start(name: str, steps: int, *overrides: str, launcher: str, processes: int) -> Job:
        config, run_dir = folder / f"{name}.yaml", folder / name
        write_steps(config, steps)
        number = cluster.submit(
            *("--nodes=2", "--gpus-per-node=0", "--oversubscribe", f"--output={run_dir}.log"),
            *("--time=60", "--signal=B:USR1@240", SCRIPT, "--config", "tiny_cpu", config, "--run-dir", run_dir),
            *("--data.train", corpus, *overrides),
            environment={**environment, "LAUNCHER": launcher, "NPROC_PER_NODE": str(processes)},
        )
        return Job(cluster, number, run_dir, config)

    tp2 = ("--parallel.tensor-model-parallel-size", "2")
    return {
        "stopped": start("stopped", 1_000_000, *tp2, launcher="torchrun", processes=1),
        "one task per process": start("tasks", STEPS, *tp2, launcher="srun", processes=2),
        "mistaken": start("mistaken", STEPS, "--model.num-attention-heads", "7", launcher="torchrun", processes=1),
    }


def test_before_its_time_limit_a_run_saves_comes_back_and_finishes(cluster: Cluster, jobs: dict[str, Job]) -> None:
    job = jobs["stopped"]
    deadline = time.monotonic() + SECONDS
    while not job.trained_steps():
        assert time.monotonic() < deadline, job.log()
        time.sleep(0.1)
    # Bring the end so near that Slurm announces it the next time it looks, which it does every 30 seconds.
    minutes = 1 + int(cluster.job(job.number)["RunTime"].split(":")[1])
    cluster.run("scontrol", "update", f"JobId={job.number}", f"TimeLimit={minutes + 3}")
    cluster.wait_for(job.number, lambda fields: fields["Restarts"] == "1", SECONDS)

    status = job.status()
    assert (status["state"], status["exit_code"]) == ("saved", 75), job.log()
    saved_step = int(str(status["step"]))
    write_steps(job.config, saved_step + STEPS)
    cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
    assert job.end() == "COMPLETED", job.log()

    assert job.lives() == [
        ("-1", str(saved_step), "75", "requeue"),
        (str(saved_step), str(saved_step + STEPS), "0", "done"),
    ]
    assert job.status() == {"state": "finished", "exit_code": 0, "step": saved_step + STEPS}
    assert job.trained_steps() == list(range(1, saved_step + STEPS + 1))


def test_one_task_per_process_trains_to_the_end(jobs: dict[str, Job]) -> None:
    job = jobs["one task per process"]
    assert job.end() == "COMPLETED", job.log()
    assert job.trained_steps() == list(range(1, STEPS + 1))
    assert job.lives() == [("-1", str(STEPS), "0", "done")]


def test_a_mistake_in_the_configuration_is_told_once(cluster: Cluster, jobs: dict[str, Job]) -> None:
    job = jobs["mistaken"]
    assert job.end() == "FAILED", job.log()
    assert "num_attention_heads" in job.log()
    assert cluster.job(job.number)["Restarts"] == "0"
    assert [life[-1] for life in job.lives()] == ["fail"]
