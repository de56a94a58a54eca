"""Fine-tuning with a teacher, from the command line: classifiers of one head, adapters in conversations."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_7b.tokenizer.train import BpeOptions, save_hugging_face_folder, train_bpe
from tests.conversion.tiny_models import save_tiny_model, save_tiny_tokenizer
from tests.finetune import test_chat
from tests.finetune.test_classic import COMMON, texts
from tests.support.commands import run_command
from tests.training.runs import metrics

PP2 = ("--nproc", 2, "--parallel.pipeline-model-parallel-size", 2)
TP2 = ("--nproc", 2, "--parallel.tensor-model-parallel-size", 2)


def finetune(
    folder: Path, run: str, student: str, data: str, *more: object, common: tuple[object, ...] = COMMON
) -> Any:
    start = ("--checkpoint.initialize-from", folder / student, "--data.train", folder / data)
    threads = ("--runtime.num-threads", 1)
    return run_command("finetune", *common, *threads, "--run-dir", folder / run, *start, *more, timeout=300)


def save_bert(folder: Path, **sizes: int) -> None:
    save_tiny_model("bert", folder, vocab_size=300, **sizes)
    options = BpeOptions(vocab_size=300, special_tokens=("[PAD]", "[CLS]", "[SEP]", "[MASK]"), split_digits=True)
    lines = ["the cat sat on the mat, the cat's 12 o'clock 123 nap  "] * 20
    save_hugging_face_folder(train_bpe(iter([lines]), options), options, folder)


def check_parts(run: Path, alpha: float = 0.5, **weights: float) -> list[float]:
    """Return the losses of the steps, each the sum of its parts."""
    lines = [line for line in metrics(run) if "loss" in line]
    for line in lines:
        parts = (1 - alpha) * line["task_loss"] + alpha * line["distillation_loss"]
        parts += sum(weight * line[f"{name}_loss"] for name, weight in weights.items())
        assert line["loss"] == pytest.approx(parts, rel=1e-6)
    return [line["loss"] for line in lines]


def test_a_classifier_learns_from_one_with_the_same_head(tmp_path: Path) -> None:
    """Its layers as well, at PP2 as on one rank; classes in another order are refused."""
    save_bert(tmp_path / "teacher", num_hidden_layers=4, hidden_size=96)
    save_bert(tmp_path / "student")
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, texts(24))))
    classify = ("texts.jsonl", "--finetune.task", "text_classification")
    done = finetune(tmp_path, "taught", "teacher", *classify, "--training.train-steps", 1)
    assert done.returncode == 0, done.stderr
    teacher = ("--distillation.teacher", tmp_path / "taught", "--distillation.temperature", 2)
    layers = ("--distillation.hidden", True, "--distillation.attention", "kl", "--distillation.attention-weight", 0.5)
    losses = []
    for run, layout in (("one", ()), ("two", PP2)):
        done = finetune(tmp_path, run, "student", *classify, *teacher, *layers, *layout)
        assert done.returncode == 0, done.stderr
        losses.append(check_parts(tmp_path / run, hidden=1.0, attention=0.5))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    exported = run_command("convert", "to-hf", "--checkpoint", tmp_path / "two", "--output", tmp_path / "hf")
    assert exported.returncode == 0, exported.stderr
    told = finetune(tmp_path, "no", "student", *classify, *teacher, "--finetune.labels", "up", "down", "sideways")
    assert told.returncode == 2
    assert "2 outputs (down, up); this run trains" in told.stderr
    assert "Traceback" not in told.stderr


def test_an_adapter_learns_conversations_from_a_whole_model(tmp_path: Path) -> None:
    """From a Hugging Face folder, at TP2 as on one rank; without a step, the distance of equal models is zero."""
    for name, layers in (("student", 3), ("teacher", 4)):
        save_tiny_model("llama_tied", tmp_path / name, vocab_size=300, num_hidden_layers=layers)
        save_tiny_tokenizer(tmp_path / name)
        (tmp_path / name / "chat_template.jinja").unlink()
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, test_chat.conversations(40))))
    lora = ("--adapter.method", "lora", "--adapter.rank", 2, "--distillation.alpha", 0.25)
    losses = []
    for run, layout in (("one", ()), ("two", TP2)):
        teacher = ("--distillation.teacher", tmp_path / "teacher", *layout)
        done = finetune(tmp_path, run, "student", "chats.jsonl", *lora, *teacher, common=test_chat.COMMON)
        assert done.returncode == 0, done.stderr
        losses.append(check_parts(tmp_path / run, alpha=0.25))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    made = set((tmp_path / "one").iterdir())
    for student, named, problem in (
        ("teacher", "teacher", f"the run in {tmp_path / 'one'} began with a folder of other files"),
        ("student", "student", "the run has learned from another one so far"),
    ):
        others = ("--distillation.teacher", tmp_path / named)
        told = finetune(tmp_path, "one", student, "chats.jsonl", *lora, *others, common=test_chat.COMMON)
        assert (told.returncode, f"is {tmp_path / named}, but {problem}" in told.stderr) == (2, True), told.stderr
        assert set((tmp_path / "one").iterdir()) == made, "nothing is imported before"
    save_tiny_model("llama_tied", tmp_path / "larger", vocab_size=301)
    others = ("--distillation.teacher", tmp_path / "larger")
    told = finetune(tmp_path, "larger_vocabulary", "student", "chats.jsonl", *lora, *others, common=test_chat.COMMON)
    assert (told.returncode, "which has 301 tokens, but the student has 300" in told.stderr) == (2, True), told.stderr
    assert not list(tmp_path.glob("larger_vocabulary/teacher-*"))
    teacher = ("--distillation.teacher", tmp_path / "student", "--training.train-steps", 1)
    done = finetune(tmp_path, "same", "student", "chats.jsonl", *lora, *teacher, common=test_chat.COMMON)
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "same")[0]["distillation_loss"] == pytest.approx(0, abs=1e-6)
