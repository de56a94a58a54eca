"""Learning from preferences beside trl's trainers: the same losses, gradients and reported figures, at any layout."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_7b.config.preferences import PREFERENCE_LOSSES
from tests.conversion.tiny_models import save_tiny_model, save_tiny_tokenizer
from tests.finetune.test_chat import COMMON
from tests.support.checkpoint_runs import saved_tensors
from tests.support.commands import run_command, run_on_ranks

STEPS, RECORDS, BETA = 3, 8, 0.3
WORDS = ["the", "cat", "sat", "on", "a", "mat", "at", "12", "o'clock", "naïve"]
LAYOUTS: dict[str, tuple[object, ...]] = {
    "tp1": (1,),
    "tp2": (2, "--parallel.tensor-model-parallel-size", 2),
    "tp2_sp": (2, "--parallel.tensor-model-parallel-size", 2, "--parallel.sequence-parallel", "True"),
    "pp3": (3, "--parallel.pipeline-model-parallel-size", 3),
    "dp2": (2, "--training.micro-batch-size", RECORDS // 2),
}


def said(first: int, count: int) -> str:
    return " ".join(WORDS[(first + place) % len(WORDS)] for place in range(count))


def pairs() -> list[dict[str, Any]]:
    """As many as a step takes, with prompts that are all different."""
    return [
        {
            "prompt": said(number, 1 + number % 4),
            "chosen": " " + said(number + 1, 2 + number % 5),
            "rejected": " " + said(3 * number, 1 + number % 3) + " on",
        }
        for number in range(RECORDS)
    ]


def labelled() -> list[dict[str, Any]]:
    return [
        {"prompt": one["prompt"], "completion": one["chosen" if number % 3 else "rejected"], "label": number % 3 != 0}
        for number, one in enumerate(pairs())
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama as a Hugging Face folder and as a checkpoint, and files of preferences."""
    path = tmp_path_factory.mktemp("preferences")
    save_tiny_model("llama_tied", path / "model", vocab_size=300)
    save_tiny_tokenizer(path / "model")
    done = run_command("convert", "from-hf", "--input", path / "model", "--output", path / "base")
    assert done.returncode == 0, done.stderr
    (path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs())))
    (path / "labelled.jsonl").write_text("\n".join(map(json.dumps, labelled())))
    return path


def finetune(folder: Path, run: Path, loss: str, *more: object, ranks: object = 1, data: str | None = None) -> Any:
    """Train with steps that read all records, so that their order does not matter; returns what the main rank said."""
    file = folder / (data or ("labelled.jsonl" if loss == "kto" else "pairs.jsonl"))
    return run_on_ranks(
        int(str(ranks)), "finetune", *COMMON, "--run-dir", run, "--data.train", file,
        "--checkpoint.initialize-from", folder / "base", "--finetune.task", "preference",
        "--finetune.preference-loss", loss, "--finetune.beta", BETA,
        "--finetune.packing", "False", "--data.split", 1, "--data.seq-length", 96,
        "--training.train-steps", STEPS, "--training.global-batch-size", RECORDS,
        "--training.micro-batch-size", RECORDS, "--optimizer.lr", 1e-3, "--optimizer.lr-decay-style", "constant",
        "--optimizer.adam-eps", 1e-6, *more,
    )[0]  # fmt: skip


def figures(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "grad_norm" in line]


def train_with_trl(folder: Path, output: Path, loss: str, smoothing: float) -> list[dict[str, float]]:
    """Return what trl logs of each step."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    options: dict[str, Any] = {
        "output_dir": str(output), "max_steps": STEPS, "logging_steps": 1, "report_to": [], "save_strategy": "no",
        "use_cpu": True, "bf16": False, "per_device_train_batch_size": RECORDS, "learning_rate": 1e-3,
        "lr_scheduler_type": "constant", "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-6,
        "weight_decay": 0.0, "max_grad_norm": 1.0, "disable_tqdm": True, "beta": BETA, "max_length": 96,
        "gradient_checkpointing": False,
    }  # fmt: skip
    if loss == "orpo":
        trainer, config = ORPOTrainer, ORPOConfig(**options)
    elif loss == "kto":
        trainer, config = KTOTrainer, KTOConfig(**options, desirable_weight=1.3, undesirable_weight=0.8)
    else:
        trainer, config = DPOTrainer, DPOConfig(**options, loss_type=[loss], label_smoothing=smoothing)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    if loss == "orpo":
        tokenizer.bos_token = None  # this trainer of trl puts one before every text, whatever the tokenizer does
    trained = trainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model"),
        args=config,
        train_dataset=Dataset.from_list(labelled() if loss == "kto" else pairs()),
        processing_class=tokenizer,
    )
    trained.train()
    return [line for line in trained.state.log_history if "grad_norm" in line]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("loss", "layout", "smoothing"),
    [
        ("sigmoid", "tp2", 0.0),
        ("robust", "dp2", 0.1),
        ("ipo", "pp3", 0.0),
        ("hinge", "dp2", 0.0),
        ("orpo", "tp2_sp", 0.0),
        ("kto", "pp3", 0.0),
    ],
)
def test_losses_gradients_and_rewards_are_those_of_trl(
    folder: Path, loss: str, layout: str, smoothing: float, tmp_path: Path
):
    expected = train_with_trl(folder, tmp_path / "trl", loss, smoothing)
    more: list[object] = ["--finetune.label-smoothing", smoothing] if smoothing else []
    if loss == "kto":
        more += ["--finetune.desirable-weight", 1.3, "--finetune.undesirable-weight", 0.8]
    ranks, *words = LAYOUTS[layout]
    done = finetune(folder, tmp_path / "run", loss, *words, *more, ranks=ranks)
    assert done.returncode == 0, done.stderr
    found = figures(tmp_path / "run")
    for name in ("loss", "grad_norm", *PREFERENCE_LOSSES[loss]):
        ours, theirs = ([line[name] for line in lines] for lines in (found, expected))
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5), name
    assert found[-1]["loss"] < found[0]["loss"]


SEVERAL: tuple[object, ...] = (
    *("--finetune.packing", "True", "--training.train-steps", 4, "--training.micro-batch-size", 1),
    *("--training.global-batch-size", 2, "--checkpoint.save-interval-steps", 2),
)


def reference(run: Path) -> np.ndarray:
    (file,) = (run / "data").glob("*.reference-*.npy")
    values: np.ndarray = np.load(file)
    return values


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """A run of four steps of two microbatches, whose rows hold several records."""
    done = finetune(folder, folder / "whole", "kto", *SEVERAL)
    assert done.returncode == 0, done.stderr
    return folder / "whole"


def test_replicas_read_the_same_microbatches(folder: Path, whole: Path, tmp_path: Path):
    """So that what KTO estimates from a microbatch does not depend on how many replicas there are."""
    distributed = ("--parallel.use-distributed-optimizer", "True")
    done = finetune(folder, tmp_path / "run", "kto", *SEVERAL, *distributed, ranks=2)
    assert done.returncode == 0, done.stderr
    for name in ("loss", "grad_norm", *PREFERENCE_LOSSES["kto"]):
        ours, others = ([line[name] for line in figures(run)] for run in (whole, tmp_path / "run"))
        assert ours == pytest.approx(others, rel=1e-5, abs=1e-5), name
    assert reference(tmp_path / "run") == pytest.approx(reference(whole), rel=1e-6)


def test_a_killed_start_and_a_resume_change_nothing(folder: Path, whole: Path, tmp_path: Path):
    """What of the reference is there is not computed again; without it, a run that has begun cannot continue."""
    (made,) = (whole / "data").glob("*.reference-*.npy")
    partial = reference(whole)
    partial[3:] = np.nan
    partial[0] += 1
    shutil.copytree(whole / "data", tmp_path / "run" / "data")
    (tmp_path / "run" / "data" / made.name).unlink()
    partial.tofile((tmp_path / "run" / "data" / made.name).with_suffix(".partial"))
    first = finetune(folder, tmp_path / "run", "kto", *SEVERAL, "--training.train-steps", 2)
    assert first.returncode == 0, first.stderr
    made_again = reference(tmp_path / "run")
    assert made_again[0] == pytest.approx(reference(whole)[0] + 1)
    np.testing.assert_array_equal(made_again[1:], reference(whole)[1:])
    (tmp_path / "run" / "data" / made.name).unlink()
    refused = finetune(folder, tmp_path / "run", "kto", *SEVERAL)
    assert "the run has left the weights that it started from" in refused.stderr
    shutil.copy(made, tmp_path / "run" / "data")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000002")
    shutil.copytree(whole / "checkpoints" / "step_00000002", tmp_path / "run" / "checkpoints" / "step_00000002")
    second = finetune(folder, tmp_path / "run", "kto", *SEVERAL)
    assert second.returncode == 0, second.stderr
    expected, found = (saved_tensors(run / "checkpoints" / "step_00000004") for run in (whole, tmp_path / "run"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_an_adapter_learns_against_the_model_without_it_and_runs_are_exported(
    folder: Path, whole: Path, tmp_path: Path
):
    adapter = ("--adapter.method", "lora", "--adapter.rank", 4)
    done = finetune(folder, tmp_path / "run", "kto", *SEVERAL, *adapter)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(reference(tmp_path / "run"), reference(whole))
    exported = run_command("convert", "to-hf", "--checkpoint", whole, "--output", tmp_path / "hf")
    assert exported.returncode == 0, exported.stderr
    first, *_, last = figures(tmp_path / "run")
    assert first["rewards/chosen"] == 0
    assert last["rewards/chosen"] > 0


@pytest.mark.parametrize(
    ("loss", "more", "words"),
    [
        ("sigmoid", ("--finetune.desirable-weight", 2), "only applies with finetune.preference_loss kto"),
        ("ipo", ("--finetune.label-smoothing", 0.1), "only applies with finetune.preference_loss sigmoid | robust"),
        ("robust", ("--finetune.label-smoothing", 0.5), "must be below 0.5"),
        ("sigmoid", ("--finetune.beta", 0), "must be above 0"),
        ("sigmoid", ("--data.seq-length", 4), "all 8 pairs of replies of"),
        ("kto", ("--data.train", "labelled.idx"), "neither a file nor a corpus of labelled replies"),
    ],
)
def test_mistakes_are_told_before_a_model_is_built(
    folder: Path, loss: str, more: tuple[object, ...], words: str, tmp_path: Path
):
    done = finetune(folder, tmp_path / "run", loss, *more)
    assert done.returncode != 0
    assert words in done.stderr
    assert "starting from the weights" not in done.stderr
