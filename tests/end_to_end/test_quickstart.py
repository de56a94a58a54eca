"""The quickstart's choices; the road itself is what test_readme.py runs, in the README's words."""

import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.assets import REPOSITORY, asset

SCRIPT = REPOSITORY / "examples" / "quickstart.sh"
PLAN = REPOSITORY / "examples" / "quickstart_plan.py"
choose = runpy.run_path(str(PLAN), run_name="plan")["choose"]


@pytest.mark.parametrize(
    ("step_seconds", "start_seconds", "steps", "batch"),
    [
        (0.1, 3, 240, 16),  # there is no use in training for longer
        (0.5, 8, 240, 16),
        (1.0, 10, 150, 16),
        (2.6, 15, 100, 8),  # two cores with AVX2
        (0.9, 45, 110, 16),  # everything but the steps is slow: fewer of them
        (20.0, 60, 80, 8),  # fewer would not learn enough to be checked
    ],
)
def test_training_takes_two_to_three_minutes(step_seconds: float, start_seconds: float, steps: int, batch: int) -> None:
    plan = choose(step_seconds, start_seconds)
    assert (plan.steps, plan.batch) == (steps, batch)
    if 1.0 <= step_seconds < 5 and start_seconds < 20:
        assert 120 <= plan.steps * plan.step_seconds <= 180


def test_what_is_promised_grows_with_the_steps() -> None:
    """Reached on this text: 0.90 after 200 steps of 16, 0.52 after 110, 0.38 after 110 of 8."""
    assert choose(0.7, 5).margin_nats == 0.4
    assert choose(2.0, 10).margin_nats == 0.2
    assert choose(0.5, 5, steps=12).margin_nats == -math.inf


def test_the_plan_is_written_for_the_next_start(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    seconds = [3.0, 1.0, 1.1, 0.9]
    metrics.write_text("".join(json.dumps({"step_seconds": one}) + "\n" for one in seconds) + "{}\n")
    subprocess.run([sys.executable, PLAN, metrics, "--seconds", "16", "--write", tmp_path / "plan"], check=True)
    values = dict(line.split("=") for line in (tmp_path / "plan").read_text().splitlines())
    assert values == {
        "STEPS": "150",
        "BATCH": "16",
        "WARMUP": "20",
        "MARGIN": "0.4",
        "START_SECONDS": "10",
        "TRAINING_SECONDS": "150",
    }


def start(folder: Path) -> "subprocess.Popen[str]":
    """Start the quickstart in a process group of its own, as a terminal does."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        [SCRIPT, folder],
        env={**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a test run in the background ignores
    )


def read_until(process: "subprocess.Popen[str]", text: str) -> str:
    """Return what was printed up to the line with a text."""
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if text in line:
            return said
    raise AssertionError(f"no {text!r} in\n{said}")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv")
def test_killed_and_interrupted_it_continues_with_what_is_done(tmp_path: Path) -> None:
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "text").write_text("1\n")
    text = asset("sotu.jsonl").read_bytes()
    (tmp_path / "sotu.jsonl").write_bytes(text * 20)  # the tokenizer takes long enough to be killed while it is trained

    killed = start(tmp_path)
    read_until(killed, "$ megatron-7b tokenizer train")
    killed.kill()  # the script alone: what it has started must not be left behind
    assert killed.wait() == -signal.SIGKILL
    assert killed.stdout is not None
    killed.stdout.read()  # ends when nobody is left who could write
    assert not (tmp_path / "tokenizer" / "tokenizer.json").exists()

    (tmp_path / "sotu.jsonl").write_bytes(text)
    interrupted = start(tmp_path)
    said = read_until(interrupted, "How fast is this machine?")
    assert "1/9 Real text: the State of the Union speeches, as JSON lines: done" in said
    os.killpg(interrupted.pid, signal.SIGINT)
    assert "quickstart: not finished (exit code 130); the same command continues" in interrupted.communicate()[0]
    assert interrupted.returncode == 130
    assert {path.name for path in (tmp_path / "done").iterdir()} == {"text", "tokenizer", "tokens"}


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    for flags in ([], ["--fresh"]):
        refused = subprocess.run([SCRIPT, *flags, tmp_path], capture_output=True, text=True, timeout=60)
        assert refused.returncode == 1
        assert "holds something else than a quickstart" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
