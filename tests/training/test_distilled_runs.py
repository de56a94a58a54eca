"""Runs that learn from a teacher, from the command line: what they write, resuming, and what is refused."""

import json
from pathlib import Path

import pytest
import torch

from megatron_7b.config import save_config
from megatron_7b.conversion import import_from_hugging_face
from tests.conversion.tiny_models import save_tiny_model
from tests.support.checkpoint_runs import saved_tensors
from tests.support.commands import run_command
from tests.training import runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, the configuration of a run, and teachers: two that fit, of which PP2 divides one, and a foreign one."""
    folder = tmp_path_factory.mktemp("distilled")
    config = runs.config(
        runs.write_corpus(folder), optimizer={"lr_decay_steps": 6}, training={"train_steps": 6, "eval_steps": 1}
    )
    save_config(config, folder / "run.yaml")
    save_tiny_model("llama", folder / "teacher", vocab_size=runs.VOCAB_SIZE, num_hidden_layers=2)
    save_tiny_model("llama_tied", folder / "other", vocab_size=runs.VOCAB_SIZE, num_hidden_layers=3)
    save_tiny_model("llama", folder / "foreign", vocab_size=runs.VOCAB_SIZE + 1, num_hidden_layers=2)
    return folder


def distil(folder: Path, name: str, *options: object, teacher: str = "teacher", is_fine: bool = True) -> str:
    result = run_command(
        "pretrain", "--config", folder / "run.yaml", "--run-dir", folder / name, "--runtime.num-threads", 1,
        "--distillation.teacher", folder / teacher, *options,
    )  # fmt: skip
    assert (result.returncode == 0) == is_fine, result.stderr
    return result.stderr


def test_a_run_reports_both_parts_and_resumes_bit_for_bit(folder: Path) -> None:
    options = ("--distillation.alpha", 0.75, "--distillation.hidden", True, "--distillation.hidden-weight", 0.5)
    whole = distil(folder, "whole", *options)
    assert "learning from" in whole
    lines = [json.loads(line) for line in (folder / "whole/metrics.jsonl").read_text().splitlines()]
    steps, validations = [x for x in lines if "loss" in x], [x for x in lines if "validation_loss" in x]
    assert validations
    for line, prefix in [*((x, "") for x in steps), *((x, "validation_") for x in validations)]:
        parts = 0.25 * line[f"{prefix}task_loss"] + 0.75 * line[f"{prefix}distillation_loss"]
        parts += 0.5 * line[f"{prefix}hidden_loss"]
        assert line[f"{prefix}loss"] == pytest.approx(parts, rel=1e-6)
    distil(folder, "parts", *options, "--training.train-steps", 3)
    distil(folder, "parts", *options)
    first, second = (saved_tensors(folder / name / "checkpoints/step_00000006") for name in ("whole", "parts"))
    assert first.keys() == second.keys()
    assert "distillation.layers.1.weight" in first  # the teacher is wider
    assert all(torch.equal(first[name], second[name]) for name in first)
    told = distil(folder, "parts", *options, "--training.train-steps", 7, teacher="other", is_fine=False)
    assert "the run has learned from another one" in told
    distil(folder, "alone", "--training.train-steps", 3)
    told = distil(folder, "alone", *options, is_fine=False)
    assert "the run has compared other layers with its teacher's so far" in told


def cache(folder: Path, name: str, *options: object, is_fine: bool = True) -> str:
    result = run_command(
        "compress", "cache-logits", "--checkpoint", folder / "teacher_checkpoint", "--data",
        folder / "corpus_text_document", "--output", folder / name, "--data.split", "80,20,0", "--data.seq-length",
        runs.SEQ_LENGTH, "--training.seed", 7, "--runtime.num-threads", 1, *options,
    )  # fmt: skip
    assert (result.returncode == 0) == is_fine, result.stderr
    return result.stderr


def learn(folder: Path, name: str, cached: str, *options: object, is_fine: bool = True) -> str:
    result = run_command(
        "pretrain", "--config", folder / "run.yaml", "--run-dir", folder / name, "--runtime.num-threads", 1,
        "--distillation.cached-logits", folder / cached, *options,
    )  # fmt: skip
    assert (result.returncode == 0) == is_fine, result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def caches(folder: Path) -> Path:
    """A cache of the whole vocabulary, written on two ranks, and one of five tokens."""
    import_from_hugging_face(folder / "teacher", folder / "teacher_checkpoint")
    tp2 = ("--nproc", 2, "--parallel.tensor-model-parallel-size", 2)
    cache(folder, "all", "--top-k", runs.VOCAB_SIZE, "--dtype", "fp32", "--num-samples", 48, *tp2)
    cache(folder, "five", "--top-k", 5, "--num-samples", 48)
    return folder


def test_a_cache_of_the_whole_vocabulary_is_the_teacher_and_one_of_a_part_the_same_at_tp2(caches: Path) -> None:
    tp2 = ("--nproc", 2, "--parallel.tensor-model-parallel-size", 2)
    recomputed = ("--parallel.recompute-granularity", "full", "--parallel.recompute-num-layers", 2)
    distil(caches, "live", "--distillation.loss", "jsd", *recomputed)
    learn(caches, "all_run", "all", "--distillation.loss", "jsd", *tp2)
    learn(caches, "five_run", "five", "--distillation.loss", "jsd")
    learn(caches, "five_at_tp2", "five", "--distillation.loss", "jsd", *tp2)
    live, of_all, five, at_tp2 = (
        [line["distillation_loss"] for line in runs.metrics(caches / name) if "loss" in line]
        for name in ("live", "all_run", "five_run", "five_at_tp2")
    )
    assert of_all == pytest.approx(live, rel=1e-5)
    assert at_tp2 == pytest.approx(five, rel=1e-5)
    assert 0 < five[0] < live[0]  # joining outcomes never adds to the distance
    validated = [line for line in runs.metrics(caches / "five_run") if "validation_loss" in line]
    assert all("validation_distillation_loss" not in line for line in validated)  # it has no cache


def test_documents_are_kept_apart_in_a_cache_as_in_the_run(caches: Path) -> None:
    """Written at PP2, several rows at a time; the live teacher keeps them apart as well."""
    apart = ("--data.reset-attention-mask", True)
    pp2 = ("--nproc", 2, "--parallel.pipeline-model-parallel-size", 2)
    whole = ("--top-k", runs.VOCAB_SIZE, "--dtype", "fp32", "--num-samples", 48)
    cache(caches, "apart", *whole, *apart, *pp2, "--training.micro-batch-size", 2)
    learn(caches, "apart_run", "apart", *apart)
    distil(caches, "apart_live", *apart)
    of_cache, live = (
        [line["distillation_loss"] for line in runs.metrics(caches / name) if "loss" in line]
        for name in ("apart_run", "apart_live")
    )
    assert of_cache == pytest.approx(live, rel=1e-5)
    assert "reset_attention_mask is True there, False here" in learn(caches, "joined", "apart", is_fine=False)


def test_a_cache_of_other_samples_is_refused(folder: Path, caches: Path) -> None:
    for option, value, says in (
        ("--training.seed", 8, "seed is 7 there, 8 here"),
        ("--data.seq-length", 8, "seq_length is 16 there, 8 here"),
        ("--distillation.temperature", 2, "were written at 1"),
        ("--training.train-steps", 7, "the run takes 56"),
    ):
        assert says in learn(caches, f"refused{option}", "five", option, value, is_fine=False)
    assert "exists" in cache(folder, "five", is_fine=False)
    told = cache(folder, "huge", "--top-k", 5, "--num-samples", 10**12, is_fine=False)
    assert "would take 512 TB: 1,000,000,000,000 samples of 16 tokens" in told
    assert not (folder / "huge.ids").exists()


def test_a_teacher_that_does_not_fit_is_refused_before_anything_is_built(folder: Path) -> None:
    told = distil(folder, "foreign_run", "--model.vocab-size", runs.VOCAB_SIZE, teacher="foreign", is_fine=False)
    assert "which has 98 tokens, but the student has 97" in told
    pipeline = ("--nproc", 2, "--parallel.pipeline-model-parallel-size", 2)
    pipeline += ("--parallel.pipeline-model-parallel-layout", 1, 1)  # the teacher has three layers
    told = distil(folder, "uneven_run", *pipeline, teacher="other", is_fine=False)
    assert "cannot run at the student's layout" in told
    assert "Traceback" not in told
