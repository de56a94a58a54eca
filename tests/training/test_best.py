"""The best weights of a run, and an end once there are no better ones: on two ranks, across a resume."""

import json
import math
from pathlib import Path

import pytest

from megatron_7b.config import check_config
from megatron_7b.errors import ConfigError
from megatron_7b.training.best import Best, KeepingBest
from tests.support.ranks import run_ranks
from tests.training.runs import config, metrics, pretrain, validations, write_corpus


def test_the_best_weights_stay_and_the_run_ends_when_none_are_better(tmp_path: Path) -> None:
    """A learning rate that ruins the weights after step 4: validations get better, then worse."""
    corpus = write_corpus(tmp_path)
    run = config(
        corpus,
        training={"train_steps": 20, "eval_interval_steps": 1, "early_stop_validations": 3},
        checkpoint={"save_interval_steps": 1, "keep_last": 1, "keep_best": "validation_loss"},
        optimizer={"lr": 0.3, "lr_decay_style": "constant", "lr_warmup_steps": 19, "clip_grad": 0.0},
    )
    assert run_ranks(2, pretrain, run, tmp_path / "run") == [(0, ""), (0, "")]
    losses = {line["step"]: line["validation_loss"] for line in validations(tmp_path / "run")}
    best = min(losses, key=losses.__getitem__)
    assert best > 1
    assert max(losses) == best + 3 < 20
    assert json.loads((tmp_path / "run" / "best.json").read_text()) == {
        "metric": "validation_loss", "value": losses[best], "step": best,
    }  # fmt: skip
    assert [path.name for path in (tmp_path / "run" / "best").glob("step_*")] == [f"step_{best:08d}"]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")] == [f"step_{best + 3:08d}"]
    assert "has not become better than" in (tmp_path / "run" / "train.log").read_text()
    assert not (tmp_path / "run" / "best" / "latest" / "optimizer").exists()  # weights alone
    (tmp_path / "run" / "best" / ".tmp-step_00000099-killed").mkdir()
    assert run_ranks(2, pretrain, run, tmp_path / "run") == [(0, ""), (0, "")]  # nothing is left to do
    assert max(line["step"] for line in validations(tmp_path / "run")) == best + 3
    assert len(list((tmp_path / "run" / "best").iterdir())) == 2  # the step and its link


def test_a_resumed_run_knows_the_best_of_earlier_starts(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path)
    options = {"training": {"train_steps": 3, "eval_interval_steps": 1}, "checkpoint": {"keep_best": "validation_loss"}}
    assert run_ranks(1, pretrain, config(corpus, **options), tmp_path / "run") == [(0, "")]
    record, lines = tmp_path / "run" / "best.json", tmp_path / "run" / "metrics.jsonl"
    changed = [json.loads(line) for line in lines.read_text().splitlines()]
    for line in changed:
        if line["step"] == 2 and "validation_loss" in line:
            line["validation_loss"] = 0.001
    lines.write_text("".join(json.dumps(line) + "\n" for line in changed))
    before = record.read_text()
    options["training"] |= {"train_steps": 9, "early_stop_validations": 4}
    assert run_ranks(1, pretrain, config(corpus, **options), tmp_path / "run") == [(0, "")]
    assert max(line["step"] for line in metrics(tmp_path / "run")) == 6  # of 3, 4, 5 and 6 none was better than 2
    assert record.read_text() == before


def test_of_errors_and_divergences_the_smallest_is_the_best() -> None:
    wanted = (("validation_absolute_error", False), ("validation_kl", False), ("validation_accuracy", True))
    for metric, larger_is_better in wanted:
        keeping = KeepingBest(metric)
        assert keeping._take(Best(metric, 0.5, 1))
        assert keeping._take(Best(metric, 0.9, 2)) == larger_is_better
        assert not keeping._take(Best(metric, math.nan, 3))


@pytest.mark.parametrize("options", [{"keep_best": "accuracy"}, {"keep_best": "validation_loss"}])
def test_what_cannot_be_the_best_is_refused(tmp_path: Path, options: dict[str, str]) -> None:
    split = "100,0,0" if options["keep_best"] == "validation_loss" else "80,20,0"
    run = config(write_corpus(tmp_path), checkpoint=options, data={"split": split})
    ((code, said),) = run_ranks(1, pretrain, run, tmp_path / "run")
    assert code is None
    assert ("there is no validation data" if split == "100,0,0" else "'validation_perplexity'") in said
    with pytest.raises(ConfigError, match="needs checkpoint.keep_best"):
        check_config(config("x", training={"early_stop_validations": 2}))
