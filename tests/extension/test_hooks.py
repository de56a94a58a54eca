"""Hooks of whoever starts a run: what they see, how they end it, and that they hide no failure."""

import os
from pathlib import Path
from typing import Any

import pytest

from megatron_7b.checkpoint import read_manifest
from megatron_7b.config.schema import RunConfig
from megatron_7b.errors import TrainingError
from tests.extension.early_stop import EarlyStop
from tests.support.ranks import run_ranks
from tests.training import runs


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return runs.write_corpus(tmp_path_factory.mktemp("corpus"))


def pretrain(config: RunConfig, run_dir: Path, hooks: list[Any]) -> tuple[int | None, str]:
    """Entry point of a rank: `training.pretrain` with hooks."""
    import torch.distributed as dist

    from megatron_7b import training

    os.environ["RANK"] = str(dist.get_rank())
    try:
        return training.pretrain(config, run_dir, hooks=hooks), ""
    except TrainingError as error:
        return None, str(error)


def test_a_hook_ends_the_run_saved_and_the_same_command_continues(corpus: str, tmp_path: Path) -> None:
    config = runs.config(
        corpus, training={"train_steps": 10, "eval_interval_steps": 2}, checkpoint={"save_interval_steps": 0}
    )
    (tmp_path / "run").mkdir()
    assert run_ranks(2, runs.pretrain, config, tmp_path / "straight") == [(0, ""), (0, "")]
    losses = [line["loss"] for line in runs.steps(tmp_path / "straight")]
    limit = (losses[4] + losses[5]) / 2
    last = next(step for step, loss in enumerate(losses, start=1) if loss < limit)
    record = tmp_path / "record"
    assert run_ranks(2, pretrain, config, tmp_path / "run", [EarlyStop(limit, record)]) == [(0, ""), (0, "")]
    assert [line["loss"] for line in runs.steps(tmp_path / "run")] == losses[:last]
    assert read_manifest(tmp_path / "run" / "checkpoints" / "latest").counters.step == last
    assert runs.status(tmp_path / "run") == {"state": "finished", "exit_code": 0, "step": last}
    assert f"finished after step {last} of 10: the loss is below" in (tmp_path / "run" / "train.log").read_text()
    validated = [f"validated {step}" for step in range(2, last + 1, 2)]
    assert record.read_text().splitlines() == ["start 0", *validated, f"end {last} None"]
    assert run_ranks(2, runs.pretrain, config, tmp_path / "run") == [(0, ""), (0, "")]
    assert [line["loss"] for line in runs.steps(tmp_path / "run")] == losses


class Noisy(EarlyStop):
    """Fails at the end, after its record, and at a step if it is told so."""

    def __init__(self, record: Path, name: str, step: int = 0) -> None:
        super().__init__(0.0, record)
        self._name, self._step = name, step

    def after_step(self, run: Any, metrics: Any) -> None:
        if metrics.step == self._step:
            raise TrainingError(f"{self._name} fails at a step")

    def on_end(self, run: Any) -> None:
        self._note(run, f"{self._name}: {run.failure}")
        raise TrainingError(f"{self._name} fails at the end")


@pytest.mark.parametrize(
    ("step", "told", "seen_by_first"),
    [(2, "first fails at a step", "first fails at a step"), (0, "second fails at the end", "second fails at the end")],
    ids=["the run fails", "only hooks fail"],
)
def test_every_hook_ends_and_the_first_failure_is_told(
    step: int, told: str, seen_by_first: str, corpus: str, tmp_path: Path
) -> None:
    record = tmp_path / "record"
    config = runs.config(corpus, training={"train_steps": 3, "eval_interval_steps": 0})
    hooks = [Noisy(record, "first", step), Noisy(record, "second")]
    assert run_ranks(2, pretrain, config, tmp_path / "run", hooks) == [(None, told)] * 2
    ends = [line for line in record.read_text().splitlines() if ": " in line]
    assert ends == [f"second: {told if step else None}", f"first: {seen_by_first}"]
    assert runs.status(tmp_path / "run")["state"] == "failed"
    assert "Noisy could not end as it should: first fails at the end" in (tmp_path / "run" / "train.log").read_text()
