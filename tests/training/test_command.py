"""`megatron-7b pretrain` as a user and a scheduler meet it: real processes, real signals, real exit codes."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megatron_7b.config import override_config, save_config
from megatron_7b.training.opening import open_folder
from megatron_7b.training.run_folder import RunFolder
from tests.support.checkpoint_runs import saved_tensors
from tests.support.ranks import run_ranks
from tests.training import runs


def command(folder: Path, *overrides: str) -> list[str]:
    return [
        sys.executable, "-m", "megatron_7b", "pretrain", "--config", str(folder / "run.yaml"),
        "--run-dir", str(folder / "run"), *overrides,
    ]  # fmt: skip


def wait_for_step(process: "subprocess.Popen[bytes]", run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 400
    while not any(line["step"] >= step for line in runs.steps(run_dir)):
        assert process.poll() is None, "the run ended before it could be stopped"
        assert time.monotonic() < deadline, "the run did not get going"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_same_command_goes_on_after_kill_9_and_after_sigterm(tmp_path: Path) -> None:
    """Three lives of a run on two ranks, whose number follows from the layout, are one run without a break."""
    config = runs.config(
        runs.write_corpus(tmp_path),
        parallel={"tensor_model_parallel_size": 2},
        training={"train_steps": 100_000, "eval_interval_steps": 0},
        optimizer={"lr_decay_steps": 10},
        checkpoint={"save_interval_steps": 5},
        telemetry={"plot": True},
    )
    save_config(config, tmp_path / "run.yaml")
    run_dir = tmp_path / "run"
    with subprocess.Popen(command(tmp_path), stderr=subprocess.DEVNULL) as process:
        wait_for_step(process, run_dir, 7)
        process.kill()  # the ranks die with their launcher
    beyond = runs.steps(run_dir)[-1]["step"] + 3  # a dying rank may have written one more

    with subprocess.Popen(command(tmp_path), stderr=subprocess.PIPE) as process:
        wait_for_step(process, run_dir, beyond)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 75, stderr.decode()
    assert "because of SIGTERM; the same command continues from here" in stderr.decode()
    step = runs.status(run_dir)["step"]
    assert step >= beyond
    assert runs.status(run_dir) == {"state": "saved", "exit_code": 75, "step": step}
    assert (run_dir / "loss.png").exists()

    end = step + 2
    resumed = subprocess.run(
        command(tmp_path, "--training.train-steps", str(end)), capture_output=True, text=True, timeout=400
    )
    assert resumed.returncode == 0, resumed.stderr
    assert f"steps {step + 1} to {end}" in resumed.stderr
    assert runs.status(run_dir) == {"state": "finished", "exit_code": 0, "step": end}
    assert resumed.stdout == ""
    # What a user can do nothing about is in the log file only (tests/runtime/test_logs.py).
    assert "Warning" not in resumed.stderr

    straight = tmp_path / "straight"
    whole = override_config(config, {"training.train_steps": end, "telemetry.plot": False})
    assert run_ranks(2, runs.pretrain, whole, straight) == [(0, ""), (0, "")]
    assert [line["step"] for line in runs.steps(run_dir)] == list(range(1, end + 1))
    assert [line["loss"] for line in runs.steps(run_dir)] == [line["loss"] for line in runs.steps(straight)]
    found, expected = (saved_tensors(folder / "checkpoints" / "latest") for folder in (run_dir, straight))
    assert found.keys() == expected.keys()
    assert any(name.startswith("optimizer.") for name in found)
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_the_folder_of_another_model_is_refused_in_one_message(tmp_path: Path) -> None:
    config = runs.config(runs.write_corpus(tmp_path))
    save_config(config, tmp_path / "run.yaml")
    with open_folder(RunFolder(tmp_path / "run"), config):
        (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    refused = subprocess.run(command(tmp_path, "--model.num-layers", "3"), capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.count("model.num_layers: the folder has 2, this start asks for 3") == 1
    assert "Traceback" not in refused.stderr
