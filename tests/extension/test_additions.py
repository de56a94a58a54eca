"""A kind of model and an objective that the package does not know are added to it in a few lines, and train."""

import math
from pathlib import Path
from typing import Any

import pytest

from megatron_7b.config import load_config
from megatron_7b.config.schema import RunConfig
from megatron_7b.errors import ConfigError
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import VOCAB_SIZE, batches, build, tiny_config

MOST_LINES = 60


def train(sections: dict[str, dict[str, Any]], num_steps: int) -> list[tuple[float, float, float]]:
    """Entry point of a rank: loss, gradient norm and the side figure of each step."""
    from megatron_7b.training.step import train_step
    from tests.extension import bigram, two_ahead

    bigram.register()
    two_ahead.register()
    config: RunConfig = tiny_config(**sections)
    trainer, results = build(config), []
    for step in range(num_steps):
        rows = batches(config, step, dp_rank=trainer.layout.dp_rank, dp_size=trainer.layout.dp_size, masked=False)
        result = train_step(trainer, rows, 0.03)
        results.append((result.loss, result.grad_norm, result.losses.extra.get("even_share", math.nan)))
    return results


@pytest.mark.parametrize("file", ["bigram.py", "two_ahead.py"])
def test_it_takes_few_lines(file: str) -> None:
    assert len((Path(__file__).parent / file).read_text().splitlines()) < MOST_LINES


@pytest.mark.parametrize("parallel", [{}, {"use_distributed_optimizer": True}])
def test_a_kind_of_model_trains(parallel: dict[str, Any]) -> None:
    sections = {"model": {"architecture": "bigram"}}
    (expected,) = run_ranks(1, train, sections, 8)
    assert expected[0][0] == pytest.approx(math.log(VOCAB_SIZE + 3), rel=0.05)  # three rows of padding
    assert expected[-1][0] < 0.8 * expected[0][0]
    for found in run_ranks(2, train, {**sections, "parallel": parallel}, 8):
        assert [row[:2] for row in found] == [pytest.approx(row[:2], rel=1e-5) for row in expected]


@pytest.mark.parametrize("architecture", ["bigram", "llama"])
def test_an_objective_trains_and_reports(architecture: str) -> None:
    sections = {"model": {"architecture": architecture}, "objective": {"name": "two_ahead"}}
    (expected,) = run_ranks(1, train, sections, 8)
    (usual,) = run_ranks(1, train, {"model": {"architecture": architecture}}, 1)
    assert expected[0][0] != usual[0][0]
    assert expected[-1][0] < 0.95 * expected[0][0]
    assert all(share == 1.0 for _, _, share in expected)  # the text has only even tokens
    for found in run_ranks(2, train, sections, 8):
        assert found == [pytest.approx(row, rel=1e-5) for row in expected]


def test_an_objective_of_ones_own_must_fit_the_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_7b.config import check_config, objectives

    with pytest.raises(ConfigError, match="two_ahead"):
        load_config(None, {"objective.name": "two_ahead"})
    monkeypatch.setitem(objectives.OBJECTIVES, "two_ahead", ("decoder",))
    check_config(load_config(None, {"objective.name": "two_ahead"}))
    encoder = {"model.architecture": "bert", "model.num_tokentypes": 2, "objective.name": "two_ahead"}
    with pytest.raises(ConfigError, match="trains a model of kind decoder"):
        check_config(load_config(None, encoder))
