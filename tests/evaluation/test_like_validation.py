"""The loss that `evaluate` measures is the one that training's validation reports on the same samples."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_7b.config import save_config
from megatron_7b.tokenizer import load_tokenizer
from tests.data.corpora import write_corpus
from tests.support.commands import run_command
from tests.training import runs

LENGTH, NUM_DOCUMENTS = 16, 24
DOCUMENTS_APART = {"reset_attention_mask": True, "reset_position_ids": True, "eod_mask_loss": True}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, float]:
    """A finished run folder, its validation corpus, and the validation loss after its last step.

    Each document fills a sample and ends with the token after which nothing counts, so that validation, which reads the
    documents in another order, sees the same samples.
    """
    folder = tmp_path_factory.mktemp("validated")
    tokenizer = load_tokenizer("bytes")
    (folder / "tokenizer").mkdir()
    tokenizer.save(folder / "tokenizer")
    random = np.random.default_rng(3)
    documents = [[*random.integers(40, 60, LENGTH - 1).tolist(), tokenizer.eod_id] for _ in range(NUM_DOCUMENTS)]
    valid = write_corpus(folder / "valid", documents)
    train = write_corpus(folder / "train", [random.integers(40, 60, 50).tolist() for _ in range(60)])
    config = runs.config(
        train,
        model={"vocab_size": None},
        data={"valid": (valid,), "tokenizer": str(folder / "tokenizer"), **DOCUMENTS_APART},
        training={"eval_interval_steps": 0, "eval_steps": NUM_DOCUMENTS // 8},
    )
    save_config(config, folder / "run.yaml")
    result = run_command("pretrain", "--config", folder / "run.yaml", "--run-dir", folder / "run", "--nproc", 1)
    assert result.returncode == 0, result.stderr
    (validation,) = runs.validations(folder / "run")
    assert validation["validation_tokens"] == NUM_DOCUMENTS * (LENGTH - 1)
    return folder / "run", valid, validation["validation_loss"]


def evaluate(run_dir: Path, corpus: str, *arguments: object) -> dict[str, Any]:
    result = run_command("evaluate", "--checkpoint", run_dir, "--data", corpus, "--json", *arguments)
    assert result.returncode == 0, result.stderr
    return dict(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "layout",
    [
        [],
        ["--parallel.tensor-model-parallel-size", 2],
        ["--parallel.pipeline-model-parallel-size", 2],
        ["--nproc", 2, "--training.micro-batch-size", 3],
    ],
    ids=["TP1", "TP2", "PP2", "DP2"],
)
def test_evaluate_gives_the_validation_loss(run: tuple[Path, str, float], layout: list[object]) -> None:
    run_dir, corpus, validation_loss = run
    figures = evaluate(run_dir, corpus, *layout)
    assert figures["tokens"] == NUM_DOCUMENTS * (LENGTH - 1)
    assert figures["loss"] == pytest.approx(validation_loss, rel=1e-6)


def test_each_option_can_be_turned_off(run: tuple[Path, str, float]) -> None:
    run_dir, corpus, validation_loss = run
    everything = evaluate(run_dir, corpus, "--data.eod-mask-loss", "False")
    assert everything["tokens"] == NUM_DOCUMENTS * LENGTH - 1
    assert everything["loss"] != pytest.approx(validation_loss, rel=1e-4)
    crossing = evaluate(
        run_dir, corpus, "--data.reset-attention-mask", "False", "--data.reset-position-ids", "False",
        "--data.seq-length", 12,
    )  # fmt: skip
    apart = evaluate(run_dir, corpus, "--data.seq-length", 12)
    assert crossing["tokens"] == apart["tokens"]
    assert crossing["loss"] != pytest.approx(apart["loss"], rel=1e-5)


def test_a_corpus_of_ends_alone_has_no_loss(run: tuple[Path, str, float], tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "ends", [[256], [256], [256]])
    result = run_command("evaluate", "--checkpoint", run[0], "--data", corpus)
    assert result.returncode == 2
    assert "no prediction counts in the 1 windows" in result.stderr
    assert "--data.eod-mask-loss False" in result.stderr
