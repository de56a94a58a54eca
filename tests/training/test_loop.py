"""The training loop on two real ranks: what it writes, when it stops, how it goes on."""

import math
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import run_ranks
from tests.training import runs

CONTRACT = [
    "step",
    "consumed_samples",
    "consumed_tokens",
    "loss",
    "learning_rate",
    "grad_norm",
    "step_seconds",
    "tokens_per_second",
    "tflops_per_device",
    "mfu",
    "memory_bytes",
    "device_memory_bytes",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return runs.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def finished(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of six steps without interruption."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    config = runs.config(corpus, telemetry={"tensorboard": True, "plot": True})
    assert run_ranks(2, runs.pretrain, config, run_dir) == [(0, ""), (0, "")]
    return run_dir


def test_each_step_and_each_validation_has_its_line(finished: Path) -> None:
    lines = runs.metrics(finished)
    kinds = [(line["step"], "validation_loss" in line) for line in lines]
    assert kinds == [(1, False), (2, False), (3, False), (3, True), (4, False), (5, False), (6, False), (6, True)]
    for line in runs.steps(finished):
        assert list(line)[: len(CONTRACT)] == CONTRACT
        assert line["consumed_samples"] == 8 * line["step"]
        assert line["consumed_tokens"] == 8 * runs.SEQ_LENGTH * line["step"]
        assert line["tokens_per_second"] == pytest.approx(8 * runs.SEQ_LENGTH / line["step_seconds"])
        assert line["mfu"] is None
        assert 50e6 < line["memory_bytes"] < 20e9
        assert line["skipped"] is False
    for line in runs.validations(finished):
        assert line["validation_perplexity"] == pytest.approx(math.exp(line["validation_loss"]))


def test_flops_are_those_of_the_model(finished: Path) -> None:
    """Worked out by hand: 3 passes' worth of 2 FLOPs per weight, and causal attention over 16 positions."""
    h, ffn, layers, s = 32, 64, 2, runs.SEQ_LENGTH
    weights = layers * (4 * h * h + 3 * h * ffn) + runs.VOCAB_SIZE * h
    attention = layers * 2 * h * s
    per_token = 3 * (2 * weights + attention)
    line = runs.steps(finished)[-1]
    assert line["tflops_per_device"] == pytest.approx(per_token * line["tokens_per_second"] / 2 / 1e12)


def test_the_loss_starts_at_the_uniform_one_and_falls(finished: Path) -> None:
    losses = [line["loss"] for line in runs.steps(finished)]
    assert losses[0] == pytest.approx(math.log(runs.VOCAB_SIZE), rel=0.02)
    assert losses[-1] < losses[0]
    first, last = (line["validation_loss"] for line in runs.validations(finished))
    assert last < first < math.log(runs.VOCAB_SIZE) + 0.1


def test_the_learning_rate_is_the_schedules(finished: Path) -> None:
    rates = [line["learning_rate"] for line in runs.steps(finished)]
    assert rates[:2] == [5e-3, 1e-2]
    assert rates[-1] == 1e-3


def test_the_run_folder_is_complete(finished: Path) -> None:
    assert runs.status(finished) == {"state": "finished", "exit_code": 0, "step": 6}
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == [
        "latest",
        "step_00000003",
        "step_00000006",
    ]
    assert (finished / "checkpoints" / "latest").resolve().name == "step_00000006"
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (finished / "config.yaml").exists()
    assert "step 6/6" in (finished / "train.log").read_text()
    assert list((finished / "tensorboard").glob("events.*"))
    assert [path.name for path in finished.rglob("*.tmp*")] == []


def test_tensorboard_has_every_step(finished: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    drawn = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert drawn == [(line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in runs.steps(finished)]
    assert [event.step for event in events.Scalars("validation/loss")] == [3, 6]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_all_and_the_next_start_goes_on_exactly(
    rank: int, corpus: str, finished: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    # Long enough that the signal arrives on the way; the schedule is held to that of the uninterrupted run.
    long = runs.config(corpus, training={"train_steps": 100_000}, optimizer={"lr_decay_steps": 6})
    number = signal.SIGTERM if rank else signal.SIGUSR1
    assert run_ranks(2, runs.pretrain_with_signal, long, run_dir, rank, number, 2) == [(75, ""), (75, "")]
    stopped = runs.status(run_dir)
    assert stopped == {"state": "saved", "exit_code": 75, "step": runs.steps(run_dir)[-1]["step"]}
    assert (run_dir / "checkpoints" / "latest").resolve().name == f"step_{stopped['step']:08d}"
    end = stopped["step"] + 3
    config = runs.config(corpus, training={"train_steps": end}, optimizer={"lr_decay_steps": 6})
    assert run_ranks(2, runs.pretrain, config, run_dir) == [(0, ""), (0, "")]
    assert [line["step"] for line in runs.steps(run_dir)] == list(range(1, end + 1))
    common = min(end, 6)
    assert [line["loss"] for line in runs.steps(run_dir)][:common] == [line["loss"] for line in runs.steps(finished)][
        :common
    ]
    assert "training.train_steps has changed since the last start" in (run_dir / "train.log").read_text()


def test_stopping_skips_the_validation_and_the_next_start_makes_up_for_it(
    corpus: str, finished: Path, tmp_path: Path
) -> None:
    hurried = runs.config(corpus, training={"exit_after_seconds": 0.0, "eval_interval_steps": 1})
    assert run_ranks(2, runs.pretrain, hurried, tmp_path / "run") == [(75, ""), (75, "")]
    assert [line["step"] for line in runs.metrics(tmp_path / "run")] == [1]
    patient = runs.config(corpus, training={"eval_interval_steps": 1, "train_steps": 2})
    assert run_ranks(2, runs.pretrain, patient, tmp_path / "run") == [(0, ""), (0, "")]
    kinds = [(line["step"], "validation_loss" in line) for line in runs.metrics(tmp_path / "run")]
    assert kinds == [(1, False), (1, True), (2, False), (2, True)]
    # A run that is finished has nothing left to do, and says so again.
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert run_ranks(2, runs.pretrain, patient, tmp_path / "run") == [(0, ""), (0, "")]
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_steps_that_are_done_again_have_one_line(corpus: str, finished: Path, tmp_path: Path) -> None:
    """As after a kill -9: metrics go further than the newest checkpoint, and the last line is torn."""
    run_dir = tmp_path / "run"
    config = runs.config(corpus, training={"train_steps": 3}, optimizer={"lr_decay_steps": 6})
    run_ranks(2, runs.pretrain, config, run_dir)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 123.0}\n{"step": 4, "validation_loss": 123.0}\n{"step": 5, "lo')
    assert run_ranks(2, runs.pretrain, runs.config(corpus), run_dir) == [(0, ""), (0, "")]
    assert [line["loss"] for line in runs.steps(run_dir)] == [line["loss"] for line in runs.steps(finished)]
    assert [line["step"] for line in runs.validations(run_dir)] == [3, 6]


def test_a_run_of_skipped_steps_ends_it_and_saves_nothing_bad(corpus: str, tmp_path: Path) -> None:
    """Weights are driven out of range by a learning rate; from then on no gradient is finite."""
    config = runs.config(
        corpus,
        optimizer={"lr": 1e36, "min_lr": 1e36, "lr_warmup_steps": 0, "clip_grad": 0.0},
        training={"train_steps": 20, "max_consecutive_nonfinite_steps": 4, "eval_interval_steps": 0},
        checkpoint={"save_interval_steps": 2},  # due while steps are skipped
    )
    outcomes = run_ranks(2, runs.pretrain, config, tmp_path / "run")
    assert all(code is None and "were all skipped" in message for code, message in outcomes)
    assert all(
        "nothing has been saved in this run folder: start again with a lower" in message for _, message in outcomes
    )
    lines = runs.steps(tmp_path / "run")
    skipped = [line for line in lines if line["skipped"]]
    assert len(skipped) == 4
    assert lines[-4:] == skipped
    assert all(line["grad_norm"] is None for line in skipped)
    assert runs.status(tmp_path / "run") == {"state": "failed", "exit_code": 1, "step": lines[-1]["step"]}
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))
    assert f"step {skipped[0]['step']} was skipped" in (tmp_path / "run" / "train.log").read_text()


def test_a_failure_on_one_rank_is_heard_on_all(tmp_path: Path) -> None:
    """One token of one document is out of the vocabulary: whichever rank reads it says so, and none waits."""
    corpus = runs.write_corpus(tmp_path, bad_id=runs.VOCAB_SIZE)
    config = runs.config(corpus, training={"train_steps": 400, "eval_interval_steps": 0, "eval_steps": 1})
    outcomes = run_ranks(2, runs.pretrain, config, tmp_path / "run", timeout=120)
    (reader,) = (rank for rank, (_, message) in enumerate(outcomes) if message.startswith("DataFormatError"))
    assert str(runs.VOCAB_SIZE) in outcomes[reader][1]
    other = outcomes[1 - reader][1]
    assert other.startswith(f"CollectiveError: rank {reader} failed in reading the batch of step ")
    assert runs.status(tmp_path / "run")["state"] == "failed"


@pytest.mark.parametrize(
    "sections",
    [
        {"precision": {"fp8": "hybrid", "params_dtype": "bf16"}},
        {"precision": {"optimizer_state_dtype": "bf16"}, "parallel": {"use_distributed_optimizer": True}},
    ],
)
def test_what_only_transformer_engine_can_do_is_refused_without_it(
    sections: dict[str, dict[str, Any]], corpus: str, tmp_path: Path
) -> None:
    option = next(f"{section}.{name}" for section, fields in sections.items() for name in fields)
    for _, message in run_ranks(2, runs.pretrain, runs.config(corpus, **sections), tmp_path / "run"):
        assert message.startswith(f"ConfigError: {option} is ")
        assert "needs Transformer Engine" in message
    assert not (tmp_path / "run").exists()


def test_the_folder_of_another_model_is_left_alone(corpus: str, finished: Path) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    outcomes = run_ranks(2, runs.pretrain, runs.config(corpus, model={"num_layers": 3}), finished)
    for _, message in outcomes:
        assert message.startswith("ConfigError:")
        assert "model.num_layers: the folder has 2, this start asks for 3" in message
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_a_fresh_run_starts_from_the_weights_of_another(corpus: str, finished: Path, tmp_path: Path) -> None:
    config = runs.config(
        corpus,
        checkpoint={"initialize_from": str(finished / "checkpoints" / "latest")},
        training={"train_steps": 1, "eval_interval_steps": 0},
        optimizer={"lr": 0.0, "min_lr": 0.0},
    )
    run_dir = tmp_path / "run"
    assert run_ranks(2, runs.pretrain, config, run_dir) == [(0, ""), (0, "")]
    # With a learning rate of zero the weights are still those of the source: same data, same validation loss.
    assert runs.validations(run_dir)[-1]["validation_loss"] == runs.validations(finished)[-1]["validation_loss"]
    assert [line["step"] for line in runs.steps(run_dir)] == [1]
