"""What examples/pretrain_7b.sh would run: `--dry-run` without Slurm, on a simulated allocation."""

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "examples" / "pretrain_7b.sh"


def run_script(
    *arguments: str, environment: Mapping[str, str], folder: Path = REPOSITORY, script: Path = SCRIPT
) -> subprocess.CompletedProcess[str]:
    """Run the batch script by hand, with nothing in the environment that could steer it but `environment`."""
    return subprocess.run(
        [str(script), *arguments],
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **environment},
        cwd=folder,
        capture_output=True,
        text=True,
    )


class Plan:
    """The output of a dry run, taken apart."""

    def __init__(self, output: str) -> None:
        lines = output.splitlines()
        self.headline = lines[0]
        self.settings = dict(line.removeprefix("export ").split("=", 1) for line in lines if line.startswith("export "))
        commands = [shlex.split(line) for line in lines if not line.startswith(("#", "export "))]
        self.srun, self.nodes = commands[0], commands[1:]


def plan(*arguments: str, folder: Path = REPOSITORY, **environment: str) -> Plan:
    """Return the plan for two nodes of eight GPUs, unless `environment` says otherwise."""
    completed = run_script(
        "--dry-run", *arguments, environment={"NODES": "2", "GPUS_PER_NODE": "8", **environment}, folder=folder
    )
    assert completed.returncode == 0, completed.stderr
    return Plan(completed.stdout)


def test_each_node_runs_one_torchrun_with_its_rank() -> None:
    shown = plan("--config", "tiny_cpu", "--run-dir", "/runs/a", "--training.seed", "7", VENV="/env")
    assert "2 nodes x 8 processes = 16 ranks on cuda" in shown.headline
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--wait=60"} <= set(shown.srun)
    trainer = "-m megatron_7b pretrain --config tiny_cpu --run-dir /runs/a --training.seed 7"
    assert [" ".join(command) for command in shown.nodes] == [
        f"/env/bin/python3 -m torch.distributed.run --nnodes=2 --nproc-per-node=8 --node-rank={rank}"
        f" --master-addr=node-1 --master-port=20000 {trainer}"
        for rank in range(2)
    ]


def test_one_task_per_gpu_gets_its_rank_from_slurm() -> None:
    shown = plan(LAUNCHER="srun")
    assert {"--ntasks=16", "--ntasks-per-node=8", "--gpu-bind=none"} <= set(shown.srun)
    ranks = "RANK={} WORLD_SIZE=16 LOCAL_RANK=0 LOCAL_WORLD_SIZE=8 MASTER_ADDR=node-1 MASTER_PORT=20000"
    assert [command[:6] for command in shown.nodes] == [ranks.format(rank).split() for rank in (0, 8)]


def test_its_own_launcher_gets_the_same_rendezvous() -> None:
    shown = plan(LAUNCHER="megatron-7b", PYTHON="python3.13")
    assert "--ntasks-per-node=1" in shown.srun
    for rank, command in enumerate(shown.nodes):
        assert command[:4] == ["python3.13", "-m", "megatron_7b", "pretrain"]
        rendezvous = f"--nnodes 2 --nproc 8 --node-rank {rank} --master-addr node-1 --master-port 20000"
        assert " ".join(command).endswith(rendezvous)


def test_processes_on_cpus_are_asked_for_by_number_and_get_no_gpu_settings() -> None:
    shown = plan(NPROC_PER_NODE="3", OMP_NUM_THREADS="2")
    assert "= 6 ranks on cpu" in shown.headline
    assert all(command[-2:] == ["--runtime.device", "cpu"] for command in shown.nodes)
    assert shown.settings["OMP_NUM_THREADS"] == "2"
    assert not any("NCCL" in name or "CUDA" in name for name in shown.settings)
    assert "--gpu-bind=none" not in shown.srun


def test_options_follow_the_environment_so_that_they_win() -> None:
    shown = plan(
        *("--config", "llama3_8b", "mine.yaml", "--training.seed", "2"),
        CONFIG="tiny_cpu",
        RUN_DIR="/runs/b",
        OVERRIDES="--training.seed 1 --data.train p",
    )
    trainer = "pretrain --config llama3_8b mine.yaml --run-dir /runs/b"
    overrides = "--training.seed 1 --data.train p --training.seed 2"
    assert " ".join(shown.nodes[0]).endswith(f"{trainer} {overrides}")


def test_what_the_user_has_set_stays() -> None:
    shown = plan(NCCL_DEBUG="INFO", MASTER_ADDR="10.0.0.1", MASTER_PORT="1234", NET_IFNAME="ib0")
    assert shown.settings["NCCL_DEBUG"] == "INFO"
    assert shown.settings["GLOO_SOCKET_IFNAME"] == shown.settings["NCCL_SOCKET_IFNAME"] == "ib0"
    assert {"--master-addr=10.0.0.1", "--master-port=1234"} <= set(shown.nodes[1])


def test_pyxis_mounts_what_the_run_needs(tmp_path: Path) -> None:
    shown = plan(
        folder=tmp_path, CONTAINER_IMAGE="nvcr.io#nvidia/pytorch:x", CONTAINER_MOUNTS="/data:/data", RUN_DIR="/runs/c"
    )
    assert "--container-image=nvcr.io#nvidia/pytorch:x" in shown.srun
    assert f"--container-workdir={tmp_path}" in shown.srun
    (mounts,) = (word.split("=", 1)[1] for word in shown.srun if word.startswith("--container-mounts="))
    assert set(mounts.split(",")) == {f"{path}:{path}" for path in (REPOSITORY, tmp_path, "/runs/c", "/data")}
    assert shown.nodes[0][0] == "python3"  # the image's own, not that of a virtual environment outside


@pytest.mark.parametrize("gpus", [True, False])
def test_apptainer_goes_before_the_task(gpus: bool) -> None:
    shown = plan(CONTAINER="apptainer", CONTAINER_IMAGE="/images/a.sif", **({} if gpus else {"NPROC_PER_NODE": "2"}))
    command = shown.srun[shown.srun.index("apptainer") :]
    assert command[:3] == ["apptainer", "exec", "--bind"]
    assert ("--nv" in command) is gpus
    assert command[command.index("/images/a.sif") + 1] == "bash"


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    plan(folder=tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ((), {}, "no Slurm allocation here"),
        (("--dry-run",), {"LAUNCHER": "mpirun"}, "LAUNCHER=mpirun is not one of torchrun, srun, megatron-7b"),
        (("--dry-run",), {"CONTAINER": "docker"}, "CONTAINER=docker is not one of none, pyxis, apptainer"),
        (("--dry-run",), {"CONTAINER": "pyxis"}, "CONTAINER=pyxis without CONTAINER_IMAGE"),
        (("--dry-run",), {"GPUS_PER_NODE": "0"}, "no GPUs"),
        (("--dry-run", "--config"), {}, "--config needs a preset"),
        (("--run-dir",), {}, "--run-dir needs a folder"),
    ],
)
def test_mistakes_are_named(arguments: tuple[str, ...], environment: dict[str, str], message: str) -> None:
    completed = run_script(*arguments, environment=environment)
    assert completed.returncode == 2
    assert message in completed.stderr
    assert completed.stdout == ""


def test_help_is_the_head_of_the_script() -> None:
    shown = run_script("--help", environment={})
    assert shown.returncode == 0
    assert shown.stdout.startswith("Pre-train on a Slurm cluster")
    assert "set -euo" not in shown.stdout


def run_task(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run what srun starts, as the second of two processes, with Python code for the trainer."""
    slurm = {
        "SLURM_NODEID": "1",
        "SLURM_PROCID": "1",
        "SLURM_NTASKS": "2",
        "SLURM_LOCALID": "0",
        "SLURMD_NODENAME": "n2",
    }
    settings = {"LAUNCHER": "srun", "NPROC_PER_NODE": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "20001"}
    return subprocess.run(
        ["bash", str(REPOSITORY / "examples" / "slurm" / "task.sh"), "-c", code],
        env={"PATH": os.environ["PATH"], "PYTHON": sys.executable, **slurm, **settings, **environment},
        capture_output=True,
        text=True,
    )


def test_a_task_is_deaf_to_the_stop_signal_until_the_trainer_listens(tmp_path: Path) -> None:
    shown = run_task("import os, signal; os.kill(os.getpid(), signal.SIGUSR1); print('alive')", RUN_DIR=str(tmp_path))
    assert shown.stdout == "alive\n"


def test_a_task_knows_its_rank(tmp_path: Path) -> None:
    names = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT"
    shown = run_task(f"import os; print(*(os.environ[name] for name in '{names}'.split()))", RUN_DIR=str(tmp_path))
    assert shown.stdout.split() == ["1", "2", "0", "1", "n1", "20001"]


def test_a_run_folder_that_a_node_does_not_see_is_named(tmp_path: Path) -> None:
    shown = run_task("print('never')", RUN_DIR=str(tmp_path / "absent"))
    assert shown.returncode == 2
    assert f"run folder {tmp_path / 'absent'} is not there on node n2" in shown.stderr
    assert shown.stdout == ""
