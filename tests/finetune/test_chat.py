"""Fine-tuning on conversations, from a Hugging Face folder: the losses, the layouts, the resume, the mistakes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_7b.data.records.corpus import RecordCorpus
from tests.conversion.tiny_models import save_tiny_model, save_tiny_tokenizer
from tests.support.checkpoint_runs import saved_tensors
from tests.support.commands import run_command, run_on_ranks

COMMON: tuple[object, ...] = (
    *("--config", "sft_tiny_cpu", "--precision.params-dtype", "fp32", "--telemetry.plot", "False"),
    *("--training.train-steps", 4, "--training.global-batch-size", 4, "--training.micro-batch-size", 2),
    *("--data.seq-length", 64, "--training.eval-interval-steps", 0, "--checkpoint.save-interval-steps", 2),
    *("--optimizer.lr", 1e-3, "--optimizer.lr-warmup-steps", 0),
)


def conversations(count: int) -> list[dict[str, Any]]:
    words = ["cat", "mat", "sat", "the", "on", "naïve"]
    return [
        {
            "messages": [
                {"role": "user", "content": " ".join(words[: 1 + number % 5])},
                {"role": "assistant", "content": " ".join(words[number % 3 :])},
            ]
        }
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with its tokenizer, and a file of conversations."""
    path = tmp_path_factory.mktemp("chat")
    save_tiny_model("llama_tied", path / "model", vocab_size=300)
    save_tiny_tokenizer(path / "model")
    (path / "model" / "chat_template.jinja").unlink()
    (path / "chats.jsonl").write_text("\n".join(json.dumps(one) for one in conversations(40)))
    return path


def finetune(folder: Path, run: Path, *more: object, chats: str = "chats.jsonl") -> Any:
    start = ("--checkpoint.initialize-from", folder / "model", "--data.train", folder / chats)
    return run_command("finetune", *COMMON, "--run-dir", run, *start, *more)


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "grad_norm" in line]


def reference_loss(folder: Path, prefix: str) -> float:
    """The mean loss of the trained tokens of all conversations, each by itself, by transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    corpus = RecordCorpus(prefix)
    total = count = 0.0
    for number, length in enumerate(corpus.lengths):
        ids, mask = corpus.tokens(number, int(length)), corpus.token_values(number)
        tokens = torch.from_numpy(ids.astype("int64"))[None]
        labels = tokens.masked_fill(torch.from_numpy(mask != 0)[None] == 0, -100)
        trained = int((labels[:, 1:] != -100).sum())
        total += model(tokens, labels=labels).loss.item() * trained
        count += trained
    return total / count


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A run of four steps on one rank, with all that the first start prepares."""
    done = finetune(folder, folder / "run")
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_the_loss_is_that_of_transformers_on_each_conversation(folder: Path, run: Path):
    prefix = str(next((run / "data").glob("*.idx")).with_suffix(""))
    for packing in ("True", "False"):
        base = next(run.glob("base-*"))
        done = run_command(
            "evaluate", "--checkpoint", base, "--data", prefix, "--json", "--objective.name", "chat",
            "--data.seq-length", 64, "--finetune.packing", packing,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["loss"] == pytest.approx(reference_loss(folder, prefix), rel=1e-6)


def test_a_chat_with_it_ends_turns_as_they_were_trained(folder: Path, tmp_path: Path):
    """The tokenizer had no template: the one that was trained is in the checkpoint, and in the export."""
    (folder / "one.jsonl").write_text("\n".join([json.dumps(conversations(2)[1])] * 8))
    longer = ("--training.train-steps", 40, "--optimizer.lr", 5e-3, "--data.split", "1", "--finetune.packing", "False")
    assert finetune(folder, tmp_path / "run", *longer, chats="one.jsonl").returncode == 0
    asked = ("--chat", "--prompt", "cat mat", "--greedy", "--max-new-tokens", 30)
    done = run_command("generate", "--checkpoint", tmp_path / "run", *asked)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "mat sat the on naïve"
    exported = run_command("convert", "to-hf", "--checkpoint", tmp_path / "run", "--output", tmp_path / "hf")
    assert exported.returncode == 0, exported.stderr
    assert (tmp_path / "hf" / "chat_template.jinja").is_file()


def test_it_learns(run: Path):
    assert losses(run)[-1] < losses(run)[0] - 0.05


@pytest.mark.parametrize(
    "layout",
    [
        ("--nproc", 2, "--parallel.tensor-model-parallel-size", 2),
        ("--nproc", 3, "--parallel.pipeline-model-parallel-size", 3),
        ("--nproc", 2, "--parallel.use-distributed-optimizer", "True"),
    ],
    ids=["tp2", "pp3", "dp2"],
)
def test_losses_are_the_same_at_every_layout(folder: Path, run: Path, layout: tuple[object, ...], tmp_path: Path):
    done = finetune(folder, tmp_path / "run", *layout)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(run), abs=1e-5)


def test_under_another_launcher_the_first_rank_prepares_while_the_other_waits(folder: Path, run: Path, tmp_path: Path):
    """As torchrun starts them: the import must not wait for the rank that waits for it."""
    start = ("--checkpoint.initialize-from", folder / "model", "--data.train", folder / "chats.jsonl")
    words = (*start, "--parallel.tensor-model-parallel-size", 2, "--runtime.num-threads", 1)
    for done in run_on_ranks(2, "finetune", *COMMON, "--run-dir", tmp_path / "run", *words):
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(run), abs=1e-5)


def test_a_resumed_run_ends_where_the_whole_one_does(folder: Path, run: Path, tmp_path: Path):
    first = finetune(folder, tmp_path / "run", "--training.train-steps", 2, "--optimizer.lr-decay-steps", 4)
    assert first.returncode == 0, first.stderr
    second = finetune(folder, tmp_path / "run", "--optimizer.lr-decay-steps", 4)
    assert "encoded" not in second.stderr
    assert losses(tmp_path / "run") == losses(run)
    expected, found = (saved_tensors(path / "checkpoints" / "step_00000004") for path in (run, tmp_path / "run"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_epochs_decide_the_steps(folder: Path, tmp_path: Path):
    words = ("--finetune.epochs", 2, "--finetune.packing", "False", "--training.global-batch-size", 20)
    done = finetune(folder, tmp_path / "run", *words, "--data.split", "1")
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "run")) == 4


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--finetune.task", "none"), "finetune.task is not set"),
        (("--checkpoint.initialize-from", "nowhere"), "initialize_from is nowhere, which does not exist"),
        (("--data.train", "nothing.jsonl"), "nothing.jsonl is neither a file nor a corpus"),
        (("--finetune.epochs", 0), "finetune.epochs is 0"),
        (("--finetune.chat-template", "nothing.jinja"), "nothing.jinja cannot be read"),
        (("--data.seq-length", 4096), "must be at most model.max_position_embeddings"),
        (("--parallel.tensor-model-parallel-size", 3, "--nproc", 3), "must divide model."),
    ],
)
def test_mistakes_are_told_before_anything_is_made(folder: Path, more: tuple[object, ...], words: str, tmp_path: Path):
    done = finetune(folder, tmp_path / "run", *more)
    assert done.returncode == 2
    assert words in done.stderr
    assert not list(tmp_path.glob("run/*")), "neither encoded nor imported"


def test_a_model_that_cannot_fit_is_told_before_its_weights_are_read(folder: Path, tmp_path: Path):
    shutil.copytree(folder / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**config, "intermediate_size": 10**12}))
    done = finetune(folder, tmp_path / "run", "--checkpoint.initialize-from", tmp_path / "model")
    assert (done.returncode, "the model cannot fit into memory" in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "run").exists()


def test_mistakes_in_the_data_are_named_by_line(folder: Path, tmp_path: Path):
    file = folder / "bad.jsonl"
    file.write_text("\n".join(map(json.dumps, [*conversations(2), {"messages": [{"role": "user", "content": "Hi"}]}])))
    done = finetune(folder, tmp_path / "run", chats="bad.jsonl")
    assert done.returncode == 1
    assert not list(tmp_path.glob("run/*/*"))
    assert f"{file}:3: no message is the assistant's" in done.stderr


def test_auto_chooses_the_layout_of_a_fine_tuning(folder: Path, run: Path):
    """From a Hugging Face folder, all weights; from a checkpoint, an adapter."""
    done = finetune(folder, folder / "auto", "--config", "sft_tiny_cpu", "auto")
    assert done.returncode == 0, done.stderr
    assert "layout    TP" in done.stderr
    assert losses(folder / "auto") == pytest.approx(losses(run), rel=1e-5)
    start = ("--checkpoint.initialize-from", next(run.glob("base-*")), "--data.train", folder / "chats.jsonl")
    adapted = run_command(
        "finetune", *COMMON, "--config", "auto", "lora_tiny_cpu", "--run-dir", folder / "auto_lora", *start,
        "--training.train-steps", 1, "--nproc", 2,
    )  # fmt: skip
    assert adapted.returncode == 0, adapted.stderr
    assert " on 2 ranks" in adapted.stderr
    assert losses(folder / "auto_lora")


def test_auto_of_a_fine_tuning_without_weights_is_told_first(folder: Path):
    chats = ("--data.train", folder / "chats.jsonl")
    done = run_command("finetune", "--config", "sft_tiny_cpu", "auto", "--run-dir", folder / "none", *chats)
    assert done.returncode == 2
    assert "checkpoint.initialize_from is not set" in done.stderr
    assert not (folder / "none").exists()
