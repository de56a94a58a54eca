"""`data prepare` as Slurm jobs: the same corpus as on one machine."""

import re
import subprocess
import sys
import time
from pathlib import Path

from megatron_7b.prepare.running.workspace import read_lines
from tests.prepare.raw_files import write_raw_files
from tests.slurm.cluster import Cluster
from tests.support.assets import REPOSITORY


def test_jobs_give_the_same_corpus_as_this_machine(cluster: Cluster, tmp_path: Path) -> None:
    inputs = write_raw_files(tmp_path / "raw", documents=60)
    options = ["--input", *map(str, inputs), "--reading.shard-megabytes", "0.05", "--split.validation", "0.2"]
    command = [sys.executable, "-m", "megatron_7b", "data", "prepare", *options]
    subprocess.run([*command, "--output-dir", tmp_path / "here"], cwd=REPOSITORY, check=True, capture_output=True)
    arguments = ["--output-dir", str(tmp_path / "there"), "--workers", "2", "--slurm-memory-gb", "0"]
    submitted = cluster.run(*command, *arguments, "--slurm-partition", "batch")
    found = re.search(r"submitted jobs (\d+) (\d+) (\d+) (\d+);", submitted)
    assert found, submitted
    wait_for_report(cluster, tmp_path / "there", int(found[4]))
    for split in ("train", "validation"):
        here, there = (sorted((tmp_path / folder / split).iterdir()) for folder in ("here", "there"))
        assert [path.name for path in there] == [path.name for path in here]
        assert len(here) > 1
        assert [list(read_lines(path)) for path in there] == [list(read_lines(path)) for path in here]
    again = cluster.run(*command, *arguments, "--slurm-partition", "batch")
    assert "holds the result of this recipe and these inputs" in again


def wait_for_report(cluster: Cluster, folder: Path, last_job: int) -> None:
    """Until the last job has written the report; a failed one says why."""
    for _ in range(600):
        if (folder / "report.json").exists():
            return
        if cluster.job(last_job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "COMPLETED"):
            break
        time.sleep(0.2)
    logs = "\n".join(path.read_text()[-2000:] for path in folder.rglob("*.out"))
    raise AssertionError(f"{cluster.job(last_job)}\n{logs}")
