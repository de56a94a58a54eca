"""Supervised fine-tuning beside trl's SFTTrainer: the same losses, the same weights."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from megatron_7b.tokenizer.default_chat_template import default_chat_template
from megatron_7b.tokenizer.load import load_tokenizer
from tests.conversion.tiny_models import save_tiny_model, save_tiny_tokenizer
from tests.finetune.test_chat import COMMON, losses
from tests.support.commands import run_command

STEPS, ROWS, MICROBATCH = 6, 8, 2


def conversations() -> list[dict[str, Any]]:
    """As many as a step takes, of one turn or two; so microbatches differ in how many tokens they train."""
    words = ["the", "cat", "sat", "on", "a", "mat", "at", "12", "o'clock", "naïve"]
    return [
        {
            "messages": [
                {"role": role, "content": " ".join(words[(number + turn) % 5 :][: 1 + (3 * number + turn) % 6])}
                for turn in range(1 + number % 2)
                for role in ("user", "assistant")
            ]
        }
        for number in range(ROWS)
    ]


def train_with_trl(folder: Path, output: Path, smoothing: float) -> tuple[list[float], dict[str, Any]]:
    """Return the losses of the steps, and the weights after them."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(
        output_dir=str(output), max_steps=STEPS, logging_steps=1, report_to=[], save_strategy="no", use_cpu=True,
        bf16=False, per_device_train_batch_size=MICROBATCH, gradient_accumulation_steps=ROWS // MICROBATCH,
        learning_rate=1e-3, lr_scheduler_type="constant", adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-6,
        weight_decay=0.1, max_grad_norm=1.0, packing=False, assistant_only_loss=True,
        disable_tqdm=True, label_smoothing_factor=smoothing,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder),
        args=config,
        train_dataset=Dataset.from_list(conversations()),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trainer.train()
    found = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return found, {name: tensor.detach().clone() for name, tensor in trainer.model.named_parameters()}


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning")
@pytest.mark.parametrize(("smoothing", "tp_size"), [(0.0, 1), (0.1, 2)])
def test_losses_and_weights_are_those_of_trl(smoothing: float, tp_size: int, tmp_path: Path):
    """A step reads all conversations, so that their order does not matter; both divide by the tokens of the step.

    Adam's epsilon is larger than usual, as it would otherwise blow up the rounding of gradients that are almost zero.
    """
    model, run = tmp_path / "model", tmp_path / "run"
    save_tiny_model("llama_tied", model, vocab_size=300)
    save_tiny_tokenizer(model)
    (model / "chat_template.jinja").write_text(default_chat_template(load_tokenizer(model)))
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, conversations())))
    expected, weights = train_with_trl(model, tmp_path / "trl", smoothing)
    done = run_command(
        "finetune", *COMMON, "--run-dir", run, "--checkpoint.initialize-from", model,
        "--data.train", tmp_path / "chats.jsonl", "--data.split", 1, "--data.seq-length", 128,
        "--finetune.packing", "False", "--training.train-steps", STEPS, "--training.global-batch-size", ROWS,
        "--training.micro-batch-size", MICROBATCH, "--optimizer.lr", 1e-3, "--optimizer.lr-decay-style", "constant",
        "--optimizer.weight-decay", 0.1, "--optimizer.adam-eps", 1e-6, "--finetune.label-smoothing", smoothing,
        "--nproc", tp_size, "--parallel.tensor-model-parallel-size", tp_size,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert losses(run) == pytest.approx(expected, abs=1e-5)
    assert losses(run)[-1] < losses(run)[0] - 0.5
    done = run_command("convert", "to-hf", "--checkpoint", run, "--output", tmp_path / "exported")
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "exported" / "model.safetensors")
    differences = {name: float((tensor - weights[name]).abs().max()) for name, tensor in found.items()}
    assert max(differences.values()) < 1e-5, differences
