"""Tasks with a teacher, from the command line: the first loss and the gradient of every parameter, by plain torch.

Each run does one update by SGD with the rate 1, so the weights that it saves tell the gradients.
"""

import dataclasses
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megatron_7b.checkpoint import resolve_checkpoint
from megatron_7b.checkpoint.manifest import read_config
from megatron_7b.config import save_config
from megatron_7b.config.schema import RunConfig
from megatron_7b.conversion import import_from_hugging_face
from megatron_7b.conversion.weights import from_hugging_face
from megatron_7b.data import Batch
from megatron_7b.data.samples.opening import UNKNOWN_CONTENTS
from megatron_7b.objective import build_objective
from megatron_7b.tokenizer import load_tokenizer
from megatron_7b.tokenizer.train import BpeOptions, save_hugging_face_folder, train_bpe
from tests.conversion.tiny_models import randomize, save_tiny_model, save_tiny_tokenizer
from tests.finetune.test_classic import tagged
from tests.support.checkpoint_runs import saved_tensors
from tests.support.commands import run_command
from tests.training import test_masked_runs
from tests.training.distillation_oracle import Layers, distance
from tests.training.runs import VOCAB_SIZE, metrics

ALPHA, TEMPERATURE = 0.7, 2.0
SIZES = {"student": {}, "teacher": {"num_hidden_layers": 4, "hidden_size": 96}}
TAGS = ("O", "B-X", "I-X")
TP2 = ("--nproc", 2, "--parallel.tensor-model-parallel-size", 2)
COMMON: tuple[object, ...] = (
    *("--precision.params-dtype", "fp32", "--telemetry.plot", "False", "--runtime.num-threads", 1),
    *("--training.train-steps", 1, "--training.global-batch-size", 4, "--training.micro-batch-size", 2),
    *("--data.split", "100,0,0", "--training.eval-interval-steps", 0),
    *("--optimizer.name", "sgd", "--optimizer.sgd-momentum", 0, "--optimizer.weight-decay", 0),
    *("--optimizer.clip-grad", 0, "--optimizer.lr", 1, "--optimizer.min-lr", 1, "--optimizer.lr-warmup-steps", 0),
    *("--distillation.alpha", ALPHA, "--distillation.temperature", TEMPERATURE),
)


@dataclasses.dataclass
class Text:
    """One text of a batch, [n] each."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    token_values: Tensor | None
    types: Tensor | None
    pair: Tensor | None = None


def texts_of(batch: Batch) -> list[Text]:
    """Return the texts that rows share; each row's pair is that of its first text."""
    assert batch.cu_seqlens is not None
    values = None if batch.records is None else batch.records.token_values
    arrays = [batch.tokens, batch.labels, batch.loss_mask, values, batch.tokentype_ids]
    flat = [None if array is None else torch.from_numpy(np.ascontiguousarray(array)).flatten() for array in arrays]
    found = []
    for begin, end in pairwise(batch.cu_seqlens.tolist()):
        row, place = divmod(begin, batch.tokens.shape[1])
        pair = torch.tensor([batch.pair_labels[row]]) if batch.pair_labels is not None and place == 0 else None
        found.append(Text(*(None if array is None else array[begin:end] for array in flat), pair))  # type: ignore[arg-type]
    return found


type Judge = Callable[[Text, Any, Any], tuple[Tensor, float]]
"""Returns the sum of a text's losses and how many they are, from what student and teacher make of it."""


def _mixed(own: Tensor, of_teacher: Tensor, labels: Tensor, config: RunConfig) -> Tensor:
    how = config.distillation
    task = cross_entropy(own, labels, reduction="none")
    return (1 - how.alpha) * task + how.alpha * distance(own, of_teacher, how)


def judge_tags(config: RunConfig) -> Judge:
    def judge(text: Text, own: Any, of_teacher: Any) -> tuple[Tensor, float]:
        assert text.token_values is not None
        words = text.token_values.nonzero()[:, 0]
        labels = text.token_values[words].long() - 1
        return _mixed(own.logits[0, words], of_teacher.logits[0, words], labels, config).sum(), len(words)

    return judge


def judge_weighted_tokens(config: RunConfig) -> Judge:
    def judge(text: Text, own: Any, of_teacher: Any) -> tuple[Tensor, float]:
        each = _mixed(own.logits[0], of_teacher.logits[0], text.labels, config)
        return (each * text.loss_mask).sum(), (text.loss_mask != 0).sum().item()

    return judge


def judge_pairs(config: RunConfig) -> Judge:
    def judge(text: Text, own: Any, of_teacher: Any) -> tuple[Tensor, float]:
        each = _mixed(own.prediction_logits[0], of_teacher.prediction_logits[0], text.labels, config)
        number = text.loss_mask.sum().item()
        total = (each * text.loss_mask).sum()
        if text.pair is not None:  # the loss of pairs no teacher judges; it is a mean over pairs, whatever they hide
            total = total + number * cross_entropy(own.seq_relationship_logits, text.pair)
        return total, number

    return judge


def plain_torch(
    auto: Any, folder: Path, config: RunConfig, batch: Batch, judge: Judge
) -> tuple[float, dict[str, Tensor]]:
    """Return the loss of a batch, and the student's weights after one update; projections under our names."""
    student, teacher = (
        auto.from_pretrained(folder / name, dtype=torch.float32, attn_implementation="eager").eval() for name in SIZES
    )
    compares_layers, projections = config.distillation.compares_layers, dict[str, Tensor]()
    if compares_layers:
        layers, of_teacher_layers = Layers(student), Layers(teacher)
        projections = layers.projections(of_teacher_layers, config)
    total, number, apart, num_tokens = torch.zeros(()), 0.0, torch.zeros(()), 0
    for text in texts_of(batch):
        types = {} if text.types is None else {"token_type_ids": text.types[None]}
        own = student(text.tokens[None], **types)
        with torch.no_grad():
            of_teacher = teacher(text.tokens[None], **types)
        loss, count = judge(text, own, of_teacher)
        total, number = total + loss, number + count
        if compares_layers and count:  # what fills up rows has no loss
            apart = apart + layers.apart(of_teacher_layers, config, projections).sum()
            num_tokens += len(text.tokens)
    loss = total / number + apart / max(1, num_tokens)
    loss.backward()
    with torch.no_grad():
        for parameter in (*student.parameters(), *projections.values()):
            parameter -= 0 if parameter.grad is None else parameter.grad
    state = {name: tensor.detach() for name, tensor in student.state_dict().items()}
    return loss.item(), state | {name: tensor.detach() for name, tensor in projections.items()}


def batch_of(config: RunConfig, run: Path) -> Batch:
    """Return the first global batch of a run."""
    tokenizer = load_tokenizer(run / "tokenizer")
    opened = build_objective(config).open_split(config, "train", tokenizer, contents=UNKNOWN_CONTENTS, reached=None)
    return opened.batch(np.arange(config.training.global_batch_size))


def check(folder: Path, auto: Any, judge: Callable[[RunConfig], Judge], *command: object) -> None:
    """Run a command on one rank and at TP2, and compare both with plain torch."""
    expected: tuple[float, dict[str, Tensor]] | None = None
    for name, layout in (("one", ()), ("two", TP2)):
        teacher = ("--distillation.teacher", folder / "teacher")
        done = run_command(*command, *COMMON, *teacher, "--run-dir", folder / name, *layout)
        assert done.returncode == 0, done.stderr
        checkpoint = resolve_checkpoint(folder / name)
        config = read_config(checkpoint)
        if expected is None:
            expected = plain_torch(auto, folder, config, batch_of(config, folder / name), judge(config))
        (loss,) = [line["loss"] for line in metrics(folder / name) if "loss" in line]
        assert loss == pytest.approx(expected[0], rel=1e-5)
        assert config.model.vocab_size is not None
        own = {name: values for name, values in expected[1].items() if name.startswith("distillation.")}
        others = {name: values for name, values in expected[1].items() if name not in own}
        wanted = dict(from_hugging_face(others, config.model, config.model.vocab_size)) | own
        found = saved_tensors(checkpoint)
        for parameter, values in wanted.items():
            torch.testing.assert_close(found[parameter][: len(values)], values, rtol=1e-4, atol=2e-5, msg=parameter)


def save_taggers(folder: Path) -> None:
    from transformers import AutoConfig, BertForTokenClassification

    for name, size in SIZES.items():
        shape = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80, **size}
        of_tags = {"id2label": dict(enumerate(TAGS)), "label2id": {tag: number for number, tag in enumerate(TAGS)}}
        config = AutoConfig.for_model("bert", **shape, **of_tags, vocab_size=300, max_position_embeddings=64)
        model = BertForTokenClassification(config).float()
        randomize(model)
        model.save_pretrained(folder / name)
        options = BpeOptions(vocab_size=300, special_tokens=("[PAD]", "[CLS]", "[SEP]", "[MASK]"), split_digits=True)
        lines = ["the cat sat on the mat, the cat's 12 o'clock 123 nap  "] * 20
        save_hugging_face_folder(train_bpe(iter([lines]), options), options, folder / name)


def test_tags_of_words_and_layers(tmp_path: Path) -> None:
    """Texts of different lengths share rows."""
    from transformers import AutoModelForTokenClassification

    save_taggers(tmp_path)
    (tmp_path / "words.jsonl").write_text("\n".join(map(json.dumps, tagged(24))))
    start = ("--checkpoint.initialize-from", tmp_path / "student", "--data.train", tmp_path / "words.jsonl")
    task = ("--config", "classify_tiny_cpu", "--finetune.task", "token_classification", "--finetune.epochs", "none")
    layers = ("--distillation.hidden", True, "--distillation.attention", "kl", "--distillation.attention-weight", 0.3)
    command = ("finetune", *task, *start, *layers, "--data.seq-length", 32)
    check(tmp_path, AutoModelForTokenClassification, judge_tags, *command)


def weighted_conversations(count: int) -> list[dict[str, Any]]:
    """Of two replies, the first has another weight each time, at times none."""
    words = ["cat", "mat", "sat", "the", "on", "nap"]
    return [
        {
            "messages": [
                {"role": "user", "content": " ".join(words[: 1 + number % 5])},
                {"role": "assistant", "content": " ".join(words[number % 3 :]), "weight": (0.25, 0, 2)[number % 3]},
                {"role": "user", "content": "on"},
                {"role": "assistant", "content": " ".join(words[: 2 + number % 4])},
            ]
        }
        for number in range(count)
    ]


def test_conversations_with_weights(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for name, case in (("student", "llama_tied"), ("teacher", "llama")):
        save_tiny_model(case, tmp_path / name, vocab_size=300, **SIZES[name])
        save_tiny_tokenizer(tmp_path / name)
        (tmp_path / name / "chat_template.jinja").unlink()
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, weighted_conversations(24))))
    start = ("--checkpoint.initialize-from", tmp_path / "student", "--data.train", tmp_path / "chats.jsonl")
    task = ("--config", "sft_tiny_cpu", "--data.seq-length", 64)
    check(tmp_path, AutoModelForCausalLM, judge_weighted_tokens, "finetune", *task, *start)


def test_pairs_of_sentences(tmp_path: Path) -> None:
    from transformers import AutoModelForPreTraining

    test_masked_runs.write_sentences(tmp_path)
    test_masked_runs.write_tokenizer(tmp_path / "tokenizer")
    for name, size in SIZES.items():
        save_tiny_model("bert_pairs", tmp_path / name, vocab_size=VOCAB_SIZE, num_attention_heads=4, **size)
    import_from_hugging_face(tmp_path / "student", tmp_path / "start")
    shape = {"num_layers": 2, "hidden_size": 48, "num_attention_heads": 4, "ffn_hidden_size": 80}
    run = test_masked_runs.config(tmp_path, {"sentence_pairs": "next_sentence"})
    model = dataclasses.replace(
        run.model, **shape, max_position_embeddings=64, hidden_dropout=0.0, attention_dropout=0.0, norm_epsilon=1e-12
    )
    start = dataclasses.replace(run.checkpoint, initialize_from=str(tmp_path / "start"))
    save_config(dataclasses.replace(run, model=model, checkpoint=start), tmp_path / "run.yaml")
    check(tmp_path, AutoModelForPreTraining, judge_pairs, "pretrain", "--config", tmp_path / "run.yaml")
