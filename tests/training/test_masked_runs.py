"""An encoder from the command line: trained, evaluated, resumed; and what is refused before any rank starts."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_7b.cli.commands import data
from megatron_7b.config import load_config, save_config
from megatron_7b.config.schema import RunConfig
from megatron_7b.errors import ConfigError
from megatron_7b.objective import build_objective
from megatron_7b.tokenizer import load_tokenizer
from megatron_7b.training.prerequisites import check_prerequisites
from tests.support.checkpoint_runs import saved_tensors
from tests.support.commands import run_command
from tests.support.ranks import run_ranks
from tests.training import runs

TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
LAYOUTS: tuple[tuple[object, ...], ...] = (
    (),
    ("--nproc", 2),
    ("--nproc", 2, "--parallel.tensor-model-parallel-size", 2),
    ("--nproc", 2, "--parallel.pipeline-model-parallel-size", 2, "--training.micro-batch-size", 7),
)


PLAIN: dict[str, Any] = {}
RUNS = {"plain": (PLAIN, TP2), "pairs": ({"sentence_pairs": "next_sentence", "masks_per_text": 2}, TP2),
        "pairs, PP2": ({"sentence_pairs": "sentence_order", "predict_word_before": True}, PP2)}  # fmt: skip


def write_sentences(folder: Path) -> str:
    """The same kind of text in documents of five sentences."""
    from megatron_7b.data import IndexWriter

    prefix, random = str(folder / "corpus_text_sentence"), np.random.default_rng(5)
    writer = IndexWriter(prefix, 2)
    for _ in range(runs.NUM_DOCUMENTS):
        start = random.integers(runs.VOCAB_SIZE)
        ids = 5 + (start + 3 * np.arange(50) + random.integers(0, 2, 50)) % (runs.VOCAB_SIZE - 5)
        writer.add_document(ids.astype(np.uint16), np.array([8, 12, 7, 13, 10]))
    writer.finish()
    return prefix


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus and a WordPiece tokenizer of as many tokens as it has."""
    folder = tmp_path_factory.mktemp("masked")
    runs.write_corpus(folder)
    write_sentences(folder)
    write_tokenizer(folder / "tokenizer")
    return folder


def write_tokenizer(folder: Path) -> None:
    words = [f"##{number}" if number % 3 == 0 else f"w{number}" for number in range(runs.VOCAB_SIZE - 5)]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))


def config(folder: Path, objective: dict[str, Any] = PLAIN, **sections: dict[str, Any]) -> RunConfig:
    has_pairs = "sentence_pairs" in objective
    corpus = folder / ("corpus_text_sentence" if has_pairs else "corpus_text_document")
    run = runs.config(str(corpus), objective=objective, **sections)
    data_section = dataclasses.replace(run.data, tokenizer=str(folder / "tokenizer"))
    model = dataclasses.replace(
        run.model, architecture="bert", num_tokentypes=2, share_embeddings_and_output_weights=True, vocab_size=None,
        hidden_dropout=0.1, attention_dropout=0.1, add_binary_head=has_pairs,
    )  # fmt: skip
    return dataclasses.replace(run, model=model, data=data_section)


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps on two tensor-parallel ranks without a break."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    run = config(folder, parallel=TP2, telemetry={"tensorboard": True})
    assert run_ranks(2, runs.pretrain, run, run_dir) == [(0, ""), (0, "")]
    return run_dir


def test_a_run_reports_what_it_hides(finished: Path) -> None:
    steps = runs.steps(finished)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert [line["consumed_tokens"] for line in steps] == [8 * runs.SEQ_LENGTH * step for step in range(1, 7)]
    assert "TensorBoard failed" not in (finished / "train.log").read_text()
    assert list((finished / "tokenizer").iterdir())


@pytest.mark.parametrize("name", RUNS)
def test_it_resumes_bit_for_bit(
    name: str, folder: Path, finished: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    objective, parallel = RUNS[name]
    whole, run_dir, decay = finished, tmp_path / "run", {"lr_decay_steps": 6}
    if name != "plain":
        whole = tmp_path / "whole"
        assert run_ranks(2, runs.pretrain, config(folder, objective, parallel=parallel), whole) == [(0, ""), (0, "")]
    half = config(folder, objective, parallel=parallel, training={"train_steps": 3}, optimizer=decay)
    for run in (half, config(folder, objective, parallel=parallel, optimizer=decay)):
        assert run_ranks(2, runs.pretrain, run, run_dir) == [(0, ""), (0, "")]
    assert [line["loss"] for line in runs.steps(run_dir)] == [line["loss"] for line in runs.steps(whole)]
    found, expected = (saved_tensors(one / "checkpoints" / "latest") for one in (run_dir, whole))
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    layout = "TP2" if parallel == TP2 else "PP2"
    record_property(
        "table: BERT, 3 steps, resumed for 3 more, against 6 in one go: weights and optimizer state bit for bit",
        f"{name:12} {layout}: {len(found)} tensors equal",
    )


def test_pairs_are_reported_and_evaluated_at_every_layout(folder: Path, tmp_path: Path) -> None:
    objective = {"sentence_pairs": "next_sentence", "predict_word_before": True}
    assert run_ranks(2, runs.pretrain, config(folder, objective), tmp_path / "run") == [(0, ""), (0, "")]
    last = runs.steps(tmp_path / "run")[-1]
    assert 0 <= last["next_sentence_accuracy"] <= 1
    assert {"masked_loss", "word_before_loss", "next_sentence_loss"} <= set(last)
    prefix, results = str(folder / "corpus_text_sentence"), []
    for layout in (LAYOUTS[1], LAYOUTS[3]):
        done = run_command("evaluate", "--checkpoint", tmp_path / "run", "--data", prefix, "--json", *layout)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout.splitlines()[-1]))
    assert [one["loss"] for one in results] == pytest.approx([results[0]["loss"]] * len(results), rel=1e-5)
    refused = run_command(
        "evaluate", "--checkpoint", tmp_path / "run", "--data", folder / "corpus_text_document", "--json"
    )
    assert "are not divided into sentences" in refused.stderr
    assert "--split-sentences" in refused.stderr


def test_a_head_that_came_with_the_weights_and_is_not_trained_stays_as_it_is(folder: Path, tmp_path: Path) -> None:
    pairs, masked = {"sentence_pairs": "next_sentence"}, {"sentence_pairs": "none"}
    assert run_ranks(2, runs.pretrain, config(folder, pairs, parallel=TP2), tmp_path / "a") == [(0, ""), (0, "")]
    start = {"initialize_from": str(tmp_path / "a" / "checkpoints" / "latest")}
    run = config(folder, masked, parallel=TP2, checkpoint=start)
    assert run_ranks(2, runs.pretrain, run, tmp_path / "b") == [(0, ""), (0, "")]
    before, after = (saved_tensors(tmp_path / name / "checkpoints" / "latest") for name in "ab")
    assert torch.equal(before["pooler.weight"], after["pooler.weight"])
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])


def test_evaluation_counts_the_hidden_tokens_at_every_layout(folder: Path, finished: Path) -> None:
    prefix = str(folder / "corpus_text_document")
    results = []
    for layout in LAYOUTS:
        done = run_command("evaluate", "--checkpoint", finished, "--data", prefix, "--json", *layout)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout.splitlines()[-1]))
    run = load_config(finished / "config.yaml")
    samples = build_objective(run).open_corpus(prefix, run, load_tokenizer(folder / "tokenizer"))
    hidden = samples.batch(range(samples.num_samples)).loss_mask.sum()
    assert {result["tokens"] for result in results} == {hidden}
    assert [result["loss"] for result in results] == pytest.approx([results[0]["loss"]] * len(LAYOUTS), rel=1e-5)


def test_an_encoder_continues_no_text(finished: Path) -> None:
    refused = run_command("generate", "--checkpoint", finished, "--prompt", "x")
    assert refused.returncode == 2
    assert "holds a model of kind encoder (bert), which cannot continue a text" in refused.stderr


def test_a_tokenizer_without_mask_is_refused_before_ranks_start(folder: Path, tmp_path: Path) -> None:
    run = config(folder, parallel=TP2)
    bytes_alone = dataclasses.replace(run, data=dataclasses.replace(run.data, tokenizer="bytes"))
    with pytest.raises(ConfigError, match=r"the tokenizer has no \[CLS\], \[SEP\], \[MASK\]"):
        check_prerequisites(bytes_alone, tmp_path / "run")
    save_config(dataclasses.replace(run, data=dataclasses.replace(run.data, tokenizer=None)), tmp_path / "run.yaml")
    refused = run_command("pretrain", "--config", tmp_path / "run.yaml", "--run-dir", tmp_path / "run")
    assert refused.returncode == 2
    assert "the tokenizer of the corpora is not known" in refused.stderr
    assert "rank" not in refused.stderr
    assert not (tmp_path / "run").exists()


def test_its_plan_counts_the_text_within_the_frames(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data.train", str(folder / "corpus_text_document"), "--data.seq-length", "16", "--data.split", "80,20,0"]
    assert data.main(["plan", "--config", "bert_tiny_cpu", *flags, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["sets"]
    assert row["epochs"] == pytest.approx(row["samples"] * 14 / row["tokens"])
