"""The quickstart's choices; the road itself is what test_readme.py runs, in the README's words."""

import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.assets import REPOSITORY

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


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    for flags in ([], ["--fresh"]):
        refused = subprocess.run([SCRIPT, *flags, tmp_path], capture_output=True, text=True, timeout=60)
        assert refused.returncode == 1
        assert "holds something else than a quickstart" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
