"""examples/preprocess_7b.sh: what it would submit, and on a cluster shards, a time limit, the merge."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_7b.cli.main import main
from tests.slurm.cluster import Cluster
from tests.support.assets import asset

SCRIPT = Path(__file__).parents[2] / "examples" / "preprocess_7b.sh"
PATIENCE = 240.0  # of a busy machine; a quiet one needs a tenth


def run_script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPT), *arguments],
        env={"PATH": os.environ["PATH"], "PYTHON": "/usr/bin/py", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_dry_run_shows_both_jobs(tmp_path: Path) -> None:
    prefix = str(tmp_path / "out" / "web")
    options = ["--input", "/raw/a b.jsonl", "--output-prefix", prefix, "--json-keys", "title", "text"]
    shown = run_script(
        "--shards", "64", *options, "--dry-run", SBATCH_ARGS="--account=a --time=1:00", MERGE_ARGS="--mem=1G"
    )
    assert shown.returncode == 0, shown.stderr
    task, array, merge = (shlex.split(line) for line in shown.stdout.splitlines() if not line.startswith("#"))
    assert task == ["/usr/bin/py", "-m", "megatron_7b", "preprocess", *options, "--shard", "I/64"]
    assert {"sbatch", "--array=0-63", "--account=a", "--time=1:00"} <= set(array)
    assert array[-len(options) - 3 :] == [str(SCRIPT), "--shards", "64", *options]
    assert {"--dependency=afterok:ARRAY", "--kill-on-invalid-dep=yes", "--account=a", "--mem=1G"} <= set(merge)
    assert merge[-5:] == [str(SCRIPT), "--shards", "64", "--output-prefix", prefix]
    assert not any(tmp_path.iterdir())


def test_some_shards_only(tmp_path: Path) -> None:
    arguments = ["--shards", "8", "--output-prefix", str(tmp_path / "o"), "--dry-run"]
    assert "--array=3,5" in shlex.split(run_script(*arguments, ONLY="3,5").stdout)
    alone = run_script(*arguments, ONLY="none").stdout
    assert "--array" not in alone
    assert "--dependency" not in alone


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output-prefix", "o"], "--shards is missing, expected a number"),
        (["--shards", "0", "--output-prefix", "o"], "--shards is 0, expected a number from 1 on"),
        (["--shards", "4"], "--output-prefix is missing"),
        (["--shards", "4", "--output-prefix", "o", "--shard", "1/4"], "--shard is for this script to say"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str) -> None:
    completed = run_script(*arguments, "--dry-run")
    assert completed.returncode == 2
    assert message in completed.stderr
    assert completed.stdout == ""


def test_help_is_the_head_of_the_script() -> None:
    shown = run_script("--help").stdout
    assert shown.startswith("Tokenize a large corpus on a Slurm cluster")
    assert "set -euo" not in shown


def test_slurm_accepts_the_header(cluster: Cluster) -> None:
    assert "to start at" in cluster.run("sbatch", "--test-only", "--cpus-per-task=1", "--mem=0", SCRIPT)


def wait_for(cluster: Cluster, name: str, log: Path) -> str:
    """The state in which the job that the script has called `name: job N` ends."""
    number = int(next(line for line in log.read_text().splitlines() if line.startswith(f"{name}: job ")).split()[-1])
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        state = cluster.job(number)["JobState"]
        if state not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"):
            return state
        time.sleep(0.2)
    raise AssertionError(f"job {number} is still {state}")


@pytest.mark.timeout(2 * PATIENCE)
def test_shards_and_merge_are_one_run(cluster: Cluster, tmp_path: Path) -> None:
    lines = asset("sotu.jsonl").read_bytes().splitlines(keepends=True)[:12]
    (tmp_path / "few.jsonl").write_bytes(b"".join(lines))
    options = ["--input", str(tmp_path / "few.jsonl"), "--tokenizer-model", "bytes", "--append-eod", "--workers", "1"]
    options += ["--json-keys", "text", "id"]
    assert main(["preprocess", *options, "--output-prefix", str(tmp_path / "whole")]) == 0
    shown = cluster.run(
        *(str(SCRIPT), "--shards", "3", *options, "--output-prefix", str(tmp_path / "out" / "web")),
        environment={"PYTHON": sys.executable, "SBATCH_ARGS": "--cpus-per-task=1 --mem=0"},
    )
    (tmp_path / "submitted").write_text(shown)
    logs = "\n".join(path.read_text() for path in (tmp_path / "out").glob("*.log"))
    assert wait_for(cluster, "merge", tmp_path / "submitted") == "COMPLETED", logs
    for kind in ("text_document", "id_document"):
        for suffix in (".bin", ".idx"):
            merged = (tmp_path / "out" / f"web_{kind}{suffix}").read_bytes()
            assert merged == (tmp_path / f"whole_{kind}{suffix}").read_bytes()
    origins = json.loads((tmp_path / "out" / "web_text_document.json").read_text())["options"]["merged_from"]
    assert [Path(origin["prefix"]).name for origin in origins] == [
        f"web_0000{number}-of-00003_text_document" for number in range(3)
    ]


@pytest.mark.slow
@pytest.mark.timeout(2 * PATIENCE)
def test_a_shard_before_its_time_limit_comes_back_and_continues(cluster: Cluster, tmp_path: Path) -> None:
    options = ["--input", str(asset("sotu.jsonl")), "--tokenizer-model", str(asset("gpt2")), "--engine", "tokenizers"]
    prefix = tmp_path / "out" / "web"
    shown = cluster.run(
        *(str(SCRIPT), "--shards", "1", *options, "--workers", "1", "--output-prefix", str(prefix)),
        environment={"PYTHON": sys.executable, "SBATCH_ARGS": "--cpus-per-task=1 --mem=0"},
    )
    (tmp_path / "submitted").write_text(shown)
    task = f"{shown.split()[2]}_0"
    journal = Path(f"{prefix}_00000-of-00001_text_document.journal")
    end = time.monotonic() + PATIENCE
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 2) and time.monotonic() < end:
        time.sleep(0.05)
    cluster.run("scancel", "--batch", "--signal=USR1", task)  # as Slurm does a minute before the limit
    log = next((tmp_path / "out").glob("*_0.log"))
    while "requeued, to continue" not in log.read_text() and time.monotonic() < end:
        time.sleep(0.05)
    assert journal.exists()
    while "of the documents by a former run" not in log.read_text() and time.monotonic() < end:
        time.sleep(2)
        if "PENDING" in cluster.run("squeue", "-h", "-j", task, "-o", "%T"):
            cluster.run("scontrol", "update", f"JobId={task}", "StartTime=now")  # Slurm holds what was requeued
    assert "of the documents by a former run" in log.read_text()
    assert wait_for(cluster, "merge", tmp_path / "submitted") == "COMPLETED"
    assert main(["data", "verify", f"{prefix}_text_document"]) == 0
