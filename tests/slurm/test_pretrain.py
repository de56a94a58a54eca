"""The whole of examples/pretrain_7b.sh with the real trainer on two nodes: stop, requeue, resume, finish."""

import json
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from megatron_7b.cli.main import main as megatron_7b
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Job
from tests.support.assets import asset

SCRIPT = Path(__file__).parents[2] / "examples" / "pretrain_7b.sh"
PATIENCE = 240.0  # of a busy machine; a quiet one needs a tenth
STEPS = 3

# So small that a step takes a few hundredths of a second; the time goes into starting the processes.
MODEL = "--model.num-layers 2 --model.hidden-size 64 --model.ffn-hidden-size 128 --data.seq-length 64"
BATCH = "--training.micro-batch-size 2 --training.global-batch-size 4 --training.eval-steps 1 --data.num-workers 0"
OUTPUTS = "--telemetry.tensorboard False --telemetry.plot False --precision.params-dtype fp32"
TP2 = ("--parallel.tensor-model-parallel-size", "2")

Submit = Callable[..., Job]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of a few speeches as bytes, by the project's own preprocessing."""
    folder = tmp_path_factory.mktemp("corpus")
    with asset("sotu.jsonl").open(encoding="utf-8") as documents:
        (folder / "few.jsonl").write_text("".join(islice(documents, 8)), encoding="utf-8")
    files = ["--input", str(folder / "few.jsonl"), "--output-prefix", str(folder / "few")]
    assert megatron_7b(["preprocess", *files, "--tokenizer-model", "bytes", "--append-eod", "--workers", "1"]) == 0
    return folder / "few_text_document"


@pytest.fixture
def submit(cluster: Cluster, corpus: Path, tmp_path: Path) -> Submit:
    """A function that submits the batch script for two nodes without GPUs."""

    def submit(*overrides: str, steps: int, launcher: str, processes: int, **environment: str) -> Job:
        config, run_dir, log = tmp_path / "steps.yaml", tmp_path / "run", tmp_path / "log"
        write_steps(config, steps)
        number = cluster.submit(
            *("--nodes=2", "--gpus-per-node=0", "--time=60", "--signal=B:USR1@240", f"--output={log}", SCRIPT),
            *("--config", "tiny_cpu", config, "--run-dir", run_dir, "--data.train", corpus, *overrides),
            environment={
                "OVERRIDES": f"{MODEL} {BATCH} {OUTPUTS}",
                "OMP_NUM_THREADS": "1",
                "PYTHON": sys.executable,
                "LAUNCHER": launcher,
                "NPROC_PER_NODE": str(processes),
                **environment,
            },
        )
        return Job(cluster, number, run_dir, log, PATIENCE)

    return submit


def write_steps(config: Path, steps: int) -> None:
    """Say how long a run is, in a file that each life reads again."""
    config.write_text(f"training: {{train_steps: {steps}}}\n")


def read_status(job: Job) -> tuple[str, int, int]:
    """Return what the trainer wrote about its end: state, exit code, step."""
    status = json.loads((job.run_dir / "status.json").read_text())
    return status["state"], status["exit_code"], status["step"]


def read_trained_steps(job: Job) -> list[int]:
    """Return the steps of metrics.jsonl, in its order."""
    path = job.run_dir / "metrics.jsonl"
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return [line["step"] for line in lines if "loss" in line]


@pytest.mark.slow
@pytest.mark.timeout(4 * PATIENCE)
def test_before_its_time_limit_a_run_saves_comes_back_and_finishes(submit: Submit) -> None:
    job = submit(*TP2, steps=1_000_000, launcher="torchrun", processes=1)
    job.wait_until(lambda: len(read_trained_steps(job)) > 0, "the first step")
    # Bring the end so near that Slurm announces it the next time it looks, which it does every 30 seconds.
    minutes = int(job.fields["RunTime"].split(":")[1])
    job.update(f"TimeLimit={minutes + 4}")
    job.wait_until(lambda: job.fields["Restarts"] == "1", "the requeue")

    state, exit_code, saved_step = read_status(job)
    assert (state, exit_code) == ("saved", 75), job.log
    write_steps(job.run_dir.with_name("steps.yaml"), saved_step + STEPS)
    job.update("TimeLimit=60")
    assert job.end() == "COMPLETED", job.log

    last_step = saved_step + STEPS
    assert job.lives == [("-1", str(saved_step), "75", "requeue"), (str(saved_step), str(last_step), "0", "done")]
    assert read_status(job) == ("finished", 0, last_step)
    assert read_trained_steps(job) == list(range(1, last_step + 1))


@pytest.mark.slow
@pytest.mark.timeout(2 * PATIENCE)
@pytest.mark.parametrize("launcher", ["torchrun", "srun", "megatron-7b"])
def test_a_run_that_is_stopped_while_it_is_built_comes_back(launcher: str, submit: Submit) -> None:
    """Signalled from its first second on, rank 0 leaves long before the first step; nobody waits for it for ever."""
    job = submit(*TP2, steps=1_000_000, launcher=launcher, processes=1, STOP_REPEAT_SECONDS="1")
    job.wait_until(lambda: "newest step" in job.log, "the start of the script")
    job.signal_script("USR1")
    # Not as soon as the life has ended: canceled before its script requeues it, the job would come back and run on.
    job.wait_until(lambda: job.fields["Restarts"] == "1", "the requeue")
    job.cancel()
    assert job.lives[0] == ("-1", "-1", "75", "requeue"), job.log
    assert read_status(job) == ("stopped", 75, 0)
    assert read_trained_steps(job) == []


@pytest.mark.slow
def test_one_task_per_process_trains_to_the_end(submit: Submit) -> None:
    job = submit(*TP2, steps=STEPS, launcher="srun", processes=2)
    assert job.end() == "COMPLETED", job.log
    assert read_trained_steps(job) == list(range(1, STEPS + 1))
    assert job.lives == [("-1", str(STEPS), "0", "done")]


def test_a_mistake_in_the_configuration_is_told_once(submit: Submit) -> None:
    job = submit("--model.num-attention-heads", "7", steps=STEPS, launcher="megatron-7b", processes=1)
    assert job.end() == "FAILED", job.log
    assert "num_attention_heads" in job.log
    assert job.fields["Restarts"] == "0"
    assert "Traceback" not in job.log
    assert [life[-1] for life in job.lives] == ["fail"]
