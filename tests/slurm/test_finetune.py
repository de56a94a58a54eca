"""examples/finetune_7b.sh with the real trainer on two nodes: rank 0 prepares, the other waits, both train."""

import json
import sys
from pathlib import Path

import pytest

from tests.conversion.tiny_models import save_tiny_model, save_tiny_tokenizer
from tests.finetune.test_chat import conversations
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Job
from tests.slurm.test_plan import REPOSITORY, Plan, run_script

SCRIPT = REPOSITORY / "examples" / "finetune_7b.sh"
PATIENCE = 240.0


def test_it_shows_what_it_would_run() -> None:
    shown = run_script(
        "--dry-run", "--data.train", "a.jsonl", environment={"NODES": "1", "GPUS_PER_NODE": "8"}, script=SCRIPT
    )
    assert shown.returncode == 0, shown.stderr
    (node,) = Plan(shown.stdout).nodes
    run_dir = REPOSITORY / "runs" / "sft_7b_8xh100_JOB"
    assert " ".join(node).endswith(
        f"-m megatron_7b finetune --config sft_7b_8xh100 --run-dir {run_dir} --data.train a.jsonl"
    )


@pytest.mark.slow
@pytest.mark.timeout(2 * PATIENCE)
def test_two_nodes_share_what_the_first_prepares(cluster: Cluster, tmp_path: Path) -> None:
    save_tiny_model("llama_tied", tmp_path / "model", vocab_size=300)
    save_tiny_tokenizer(tmp_path / "model")
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, conversations(40))))
    run_dir, log = tmp_path / "run", tmp_path / "log"
    number = cluster.submit(
        *("--nodes=2", "--gpus-per-node=0", "--time=60", f"--output={log}", SCRIPT, "--config", "sft_tiny_cpu"),
        *("--run-dir", run_dir, "--data.train", tmp_path / "chats.jsonl"),
        *("--checkpoint.initialize-from", tmp_path / "model", "--parallel.tensor-model-parallel-size", "2"),
        *("--data.seq-length", "64", "--training.train-steps", "2", "--precision.params-dtype", "fp32"),
        environment={"OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "NPROC_PER_NODE": "1"},
    )
    job = Job(cluster, number, run_dir, log, PATIENCE)
    assert job.end() == "COMPLETED", job.log
    assert job.lives == [("-1", "2", "0", "done")]
    assert len(list(run_dir.glob("base-*"))) == len(list(run_dir.glob("data/*.idx"))) == 1
