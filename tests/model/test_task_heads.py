"""Heads of every kind of model against transformers' …For… classes: losses and the gradient of every parameter."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_7b.checkpoint import resolve_checkpoint
from megatron_7b.config.schema import RunConfig
from megatron_7b.conversion.families import FAMILIES
from megatron_7b.data import Batch
from megatron_7b.data.samples.dataset import RecordsOfBatch
from megatron_7b.model.kinds import parameter_table
from tests.conversion.tiny_models import randomize
from tests.model.test_against_transformers import shard
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import tiny_config

VOCAB_SIZE, LENGTHS, ROW, WINDOW = 203, (9, 4, 13, 6), 16, 5
SEQUENCE, TOKEN, ANSWER = "sequence_classification", "token_classification", "question_answering"
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP1": {},
    "TP2": {"tensor_model_parallel_size": 2},
    "TP2+SP": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP2": {"pipeline_model_parallel_size": 2},
}
HEADS: dict[str, dict[str, Any]] = {
    "one label": {"head": SEQUENCE, "num_labels": 3},
    "several labels": {"head": SEQUENCE, "num_labels": 4, "problem_type": "multi_label_classification"},
    "regression": {"head": SEQUENCE, "num_labels": 1, "problem_type": "regression"},
    "tokens": {"head": TOKEN, "num_labels": 5},
    "answers": {"head": ANSWER},
}
EVERYWHERE = ("llama", "bert")
"""Architectures that are computed at every layout with every head; others where their names differ from these."""
CASES = [
    *((architecture, head) for architecture in EVERYWHERE for head in HEADS),
    *(
        (architecture, head)
        for architecture in ("gpt2", "megatron-bert")
        for head in ("one label", "tokens", "answers")
    ),
    *((architecture, "answers") for architecture in ("mistral", "qwen2", "qwen3")),
]


def head_config(architecture: str, head: str, **parallel: Any) -> RunConfig:
    has_groups = architecture not in ("gpt2", "bert", "megatron-bert")
    fixed = RunConfig().model.traits.fixed | {"qwen2": {"add_qkv_bias": True}, "qwen3": {"qk_layernorm": True}}.get(
        architecture, {}
    )
    return tiny_config(
        model={
            **fixed,
            **HEADS[head],
            "architecture": architecture,
            "num_query_groups": 2 if has_groups else None,
            "num_tokentypes": 2 if "bert" in architecture else 0,
            "vocab_size": VOCAB_SIZE,
            "max_position_embeddings": 16,
            "window_size": WINDOW if architecture == "mistral" else None,
            "norm_epsilon": 1e-6,
        },
        data={"seq_length": ROW},
        parallel=parallel,
    )


def texts(head: str) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Ids and a value per token of each text, and the values of each text."""
    random = np.random.default_rng(3)
    ids = [random.integers(1, VOCAB_SIZE, length) for length in LENGTHS]
    count = HEADS[head].get("num_labels", 2)
    if head == "tokens":
        return ids, [random.integers(0, count + 1, length) for length in LENGTHS], np.zeros((len(LENGTHS), 0))
    types = [(np.arange(length) > length // 2).astype(np.int64) for length in LENGTHS]
    values = {
        "one label": random.integers(0, count, (len(LENGTHS), 1)),
        "several labels": random.integers(0, 2, (len(LENGTHS), count)),
        "regression": random.normal(size=(len(LENGTHS), 1)),
        "answers": np.array([(0, 0), (1, 3), (5, 5), (2, 4)]),
    }
    return ids, types, values[head].astype(np.float32)


def microbatch(head: str) -> Batch:
    """The texts in two rows."""
    ids, tokens, values = texts(head)
    begins = np.cumsum((0, *LENGTHS[:-1]))
    rows = (2, ROW)
    return Batch(
        np.concatenate(ids).reshape(rows),
        np.zeros(rows, np.int64),
        np.zeros(rows, np.float32),
        np.concatenate([np.arange(length) for length in LENGTHS]).reshape(rows),
        cu_seqlens=np.cumsum((0, *LENGTHS), dtype=np.int32),
        records=RecordsOfBatch(
            begins=begins,
            lengths=np.array(LENGTHS),
            record=np.arange(len(LENGTHS)),
            numbers=np.arange(len(LENGTHS)),
            values=values,
            token_values=np.concatenate(tokens).astype(np.float32).reshape(rows),
        ),
    )


def save_reference(architecture: str, head: str, folder: Path) -> Any:
    """Save a model of transformers with weights far from their usual initial values."""
    import transformers
    from transformers import AutoConfig

    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    if architecture == "gpt2":
        sizes |= {"n_inner": 96, "n_positions": 16, "layer_norm_epsilon": 1e-6}
    elif "bert" in architecture:
        sizes |= {"intermediate_size": 96, "max_position_embeddings": 16, "layer_norm_eps": 1e-6}
    else:
        sizes |= {"intermediate_size": 96, "max_position_embeddings": 16, "num_key_value_heads": 2, "head_dim": 16}
        sizes |= {"sliding_window": WINDOW} if architecture == "mistral" else {}
    model = head_config(architecture, head).model
    kind = {"problem_type": model.problem_type} if model.head == SEQUENCE else {}
    config = AutoConfig.for_model(architecture, **sizes, num_labels=model.num_labels, pad_token_id=0, **kind)
    reference = getattr(transformers, FAMILIES[architecture].class_of(model))(config).float().eval()
    randomize(reference)
    reference.save_pretrained(folder)
    return reference


def expected(reference: Any, head: str) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and the gradients of transformers, text by text."""
    ids, tokens, values = texts(head)
    has_types = "bert" in reference.config.model_type
    total, count = torch.zeros(()), 0
    for text, of_tokens, of_text in zip(ids, tokens, torch.from_numpy(values), strict=True):
        asked: dict[str, Any] = {"input_ids": torch.from_numpy(text)[None]}
        if has_types and head != "tokens":
            asked["token_type_ids"] = torch.from_numpy(of_tokens)[None]
        if head == "tokens":
            labels = torch.from_numpy(of_tokens) - 1
            asked["labels"] = labels.masked_fill(labels < 0, -100)[None]
        elif head == "answers":
            asked |= {"start_positions": of_text[:1].long(), "end_positions": of_text[1:].long()}
        else:
            asked["labels"] = of_text.long() if head == "one label" else of_text[None]
        weight = int((of_tokens > 0).sum()) if head == "tokens" else 1
        total = total + reference(**asked).loss * weight
        count += weight
    loss = total / count
    loss.backward()
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in reference.named_parameters()
    }
    return loss.item(), gradients


def import_reference(folder: Path, output: Path) -> None:
    """Entry point of a rank: the folder as a checkpoint, whose outputs are compared on the way."""
    from megatron_7b.conversion import import_from_hugging_face

    import_from_hugging_face(folder, output)


def run_ours(config: RunConfig, folder: Path) -> tuple[float, dict[str, np.ndarray], float]:
    """Entry point of a rank: mean loss, gradients of this rank's parameters, and their norm to the optimizer."""
    from megatron_7b.checkpoint.load import load_weights
    from megatron_7b.model.builder import named_canonical_parameters
    from megatron_7b.objective.microbatches import run_microbatches
    from megatron_7b.parallel.groups import broadcast_from_last_stage
    from megatron_7b.training.learner import build_learner

    core = build_learner(config, "cpu")
    load_weights(folder, core.model)
    batch = microbatch(next(name for name, fields in HEADS.items() if fields.items() <= vars(config.model).items()))
    totals = run_microbatches(
        core.model, [batch], core.objective, layout=core.layout, device=core.device, forward_only=False
    )
    loss, count = broadcast_from_last_stage(totals)[0].tolist()
    gradients = {
        name: parameter.main_grad.numpy().copy()
        for name, parameter in named_canonical_parameters([core.model[0].module])
    }
    return loss / count, gradients, core.optimizer.step(0.0).grad_norm


@pytest.mark.parametrize(("architecture", "head"), CASES)
def test_losses_and_gradients_are_those_of_transformers(architecture: str, head: str, tmp_path: Path) -> None:
    from megatron_7b.conversion import from_hugging_face

    reference = save_reference(architecture, head, tmp_path / "in")
    run_ranks(1, import_reference, tmp_path / "in", tmp_path / "ours")
    loss, gradients = expected(reference, head)
    model = head_config(architecture, head).model
    ours = dict(from_hugging_face(gradients, model, VOCAB_SIZE))
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm().item()
    table = parameter_table(model, VOCAB_SIZE)
    for layout in LAYOUTS.values() if architecture in EVERYWHERE else [LAYOUTS["TP2+SP"]]:
        config = head_config(architecture, head, **layout)
        tp = layout.get("tensor_model_parallel_size", 1)
        world = tp * layout.get("pipeline_model_parallel_size", 1)
        seen = set()
        for rank, (found, of_rank, found_norm) in enumerate(
            run_ranks(world, run_ours, config, resolve_checkpoint(tmp_path / "ours"))
        ):
            assert found == pytest.approx(loss, rel=1e-5)
            assert found_norm == pytest.approx(norm, rel=1e-5)
            for name, gradient in of_rank.items():
                seen.add(name)
                right = shard(table[name], ours[name], gradient.shape, rank % tp, tp)
                np.testing.assert_allclose(gradient, right, rtol=1e-4, atol=1e-5 * largest, err_msg=name)
        assert seen == set(ours) == set(table)
