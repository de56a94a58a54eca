"""examples/pretrain_7b.sh as Slurm itself sees it: its header, and its way back to its library."""

from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster

SCRIPT = Path(__file__).parents[2] / "examples" / "pretrain_7b.sh"


def test_slurm_accepts_the_header(cluster: Cluster) -> None:
    assert "to start at" in cluster.run("sbatch", "--test-only", "--nodes=2", SCRIPT)
    assert "to start at" in cluster.run("sbatch", "--test-only", "--nodes=2", "--gpus-per-node=0", SCRIPT)


def test_slurm_would_refuse_a_header_that_asks_for_too_much(cluster: Cluster) -> None:
    with pytest.raises(AssertionError, match="not available"):
        cluster.run("sbatch", "--test-only", "--nodes=2", "--gpus-per-node=9", SCRIPT)


@pytest.mark.parametrize(("gpus", "ranks"), [("8", "16 ranks on cuda"), ("0", "4 ranks on cpu")])
def test_a_dry_run_in_a_job_shows_the_real_nodes(cluster: Cluster, tmp_path: Path, gpus: str, ranks: str) -> None:
    # From a folder that has no examples/: Slurm runs a copy of the script, which must find the original's library.
    where = [f"--chdir={tmp_path}", f"--output={tmp_path}/log"]
    cluster.run(
        *("sbatch", "--wait", "--nodes=2", f"--gpus-per-node={gpus}", *where, SCRIPT, "--dry-run"),
        environment={"NPROC_PER_NODE": "2"} if gpus == "0" else {},
    )
    shown = (tmp_path / "log").read_text()
    assert ranks in shown
    assert "which on n1 runs" in shown
    assert "which on n2 runs" in shown
    assert "--master-addr=n1" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
