"""loss.png, read back as a picture."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_7b.training.plot import centred_mean, plot_loss, read_loss_curves

matplotlib_image = pytest.importorskip("matplotlib.image")
TRAINING, VALIDATION = (0x24, 0x63, 0xA8), (0xD1, 0x49, 0x5B)


def write_metrics(path: Path, losses: dict[int, float | None], validations: dict[int, float]) -> None:
    with path.open("w") as file:
        for step, loss in losses.items():
            line = {"step": step, "consumed_tokens": 4096 * step, "loss": loss, "skipped": loss is None}
            file.write(json.dumps(line) + "\n")
            if step in validations:
                file.write(json.dumps({"step": step, "validation_loss": validations[step]}) + "\n")


def pixels(picture: Path, colour: tuple[int, int, int]) -> np.ndarray:
    """Rows and columns of the pixels of a colour, [n, 2]."""
    image = (matplotlib_image.imread(picture)[:, :, :3] * 255).round().astype(int)
    return np.argwhere((np.abs(image - colour) <= 2).all(axis=2))


def test_both_curves_are_drawn_and_a_falling_loss_falls(tmp_path: Path) -> None:
    write_metrics(tmp_path / "m.jsonl", {step: 10.0 - step for step in range(1, 10)}, {3: 8.0, 9: 2.0})
    assert plot_loss(tmp_path / "m.jsonl", tmp_path / "loss.png", title="a run")
    training = pixels(tmp_path / "loss.png", TRAINING)
    assert len(training) > 500
    assert len(pixels(tmp_path / "loss.png", VALIDATION)) > 200
    left, right = training[training[:, 1].argmin()], training[:, 0].max()
    assert left[0] < right  # rows count downwards
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["loss.png", "m.jsonl"]


def test_skipped_steps_and_torn_lines_are_no_losses(tmp_path: Path) -> None:
    write_metrics(tmp_path / "m.jsonl", {1: 3.0, 2: None, 3: 2.0}, {})
    with (tmp_path / "m.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    curves = read_loss_curves(tmp_path / "m.jsonl")
    assert (curves.steps, curves.losses, curves.skipped_steps) == ([1, 3], [3.0, 2.0], [2])
    assert plot_loss(tmp_path / "m.jsonl", tmp_path / "loss.png")


@pytest.mark.parametrize("losses", [{1: 3.0}, {1: None}, {1: None, 2: None, 3: 1.0}, {5: 1.0, 6: 1.0}])
def test_short_runs_are_drawn_too(tmp_path: Path, losses: dict[int, float | None]) -> None:
    write_metrics(tmp_path / "m.jsonl", losses, {})
    drawn = plot_loss(tmp_path / "m.jsonl", tmp_path / "loss.png")
    assert drawn == (tmp_path / "loss.png").exists() == any(loss is not None for loss in losses.values())


def test_nothing_to_draw_leaves_an_earlier_picture_alone(tmp_path: Path) -> None:
    (tmp_path / "loss.png").write_bytes(b"earlier")
    assert not plot_loss(tmp_path / "absent.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes() == b"earlier"


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=60), st.integers(1, 20))
def test_the_mean_is_the_mean_of_what_lies_around(values: list[float], window: int) -> None:
    half = window // 2
    expected = [np.mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    assert centred_mean(values, window) == pytest.approx(expected, abs=1e-9)
