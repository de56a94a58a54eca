"""Kinds of models against transformers with the same weights: logits, losses and gradients at several layouts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_7b.checkpoint import resolve_checkpoint
from megatron_7b.config.schema import RunConfig
from megatron_7b.data import Batch
from megatron_7b.model.initialization import shard_ranges
from megatron_7b.model.kinds import parameter_table
from megatron_7b.model.parameters import Parameter
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import tiny_config

VOCAB_SIZE, LENGTHS = 203, (9, 1, 14, 8)
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP1": {},
    "TP2": {"tensor_model_parallel_size": 2},
    "TP2+SP": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP2": {"pipeline_model_parallel_size": 2},
    "TP2xPP2+SP": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
}


def model_config(architecture: str, *, is_tied: bool, pairs: str = "none", **parallel: Any) -> RunConfig:
    return tiny_config(
        objective={"sentence_pairs": pairs},
        model={
            "architecture": architecture,
            "num_query_groups": None,
            "num_tokentypes": 2 if "bert" in architecture else 0,
            "vocab_size": VOCAB_SIZE,
            "max_position_embeddings": 16,
            "norm_epsilon": 1e-12,
            "share_embeddings_and_output_weights": is_tied,
            "add_binary_head": pairs != "none",
        },
        data={"seq_length": 16},
        parallel=parallel,
    )


def reference(architecture: str, *, is_tied: bool) -> Any:
    """A model of transformers with weights far from their usual initial values."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    if architecture == "gpt2":
        options = {**sizes, "n_inner": 96, "n_positions": 16, "layer_norm_epsilon": 1e-12}
    else:
        options = {**sizes, "intermediate_size": 96, "max_position_embeddings": 16}
    config = AutoConfig.for_model(architecture, tie_word_embeddings=is_tied, **options)
    auto = AutoModelForCausalLM if architecture == "gpt2" else AutoModelForMaskedLM
    model = auto.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm_weight = name.lower().endswith(
                ("norm.weight", "ln.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight")
            )
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + is_norm_weight)
        if architecture != "gpt2":
            model.cls.predictions.bias.copy_(model.cls.predictions.decoder.bias)
    return model


def sentences() -> dict[str, torch.Tensor]:
    """Sentences of `LENGTHS`: ids, token types, labels and mask, each [t]."""
    random = np.random.default_rng(3)
    t = sum(LENGTHS)
    ids, labels = (torch.from_numpy(random.integers(0, VOCAB_SIZE, t)) for _ in range(2))
    return {
        "ids": ids,
        "types": torch.from_numpy(random.integers(0, 2, t)),
        "labels": labels,
        "mask": torch.from_numpy((random.random(t) < 0.4).astype(np.float32)),
    }


def write_reference(architecture: str, is_tied: bool, folder: Path) -> None:
    """Entry point of a rank: the reference's weights as a checkpoint of ours."""
    from megatron_7b.checkpoint.weights import write_weights
    from megatron_7b.conversion import from_hugging_face

    config = model_config(architecture, is_tied=is_tied)
    weights = {
        name: tensor for name, tensor in reference(architecture, is_tied=is_tied).state_dict().items()
        if not name.endswith("position_ids")
    }  # fmt: skip
    write_weights(folder, from_hugging_face(weights, config.model, VOCAB_SIZE), config)


def microbatch(architecture: str) -> Batch:
    """The sentences as the model takes them: told apart for an encoder, as two rows of 16 for a decoder."""
    rows = {name: tensor.numpy().reshape(2, 16) for name, tensor in sentences().items()}
    is_encoder = "bert" in architecture
    positions = np.concatenate([np.arange(length) for length in LENGTHS]) if is_encoder else np.tile(np.arange(16), 2)
    return Batch(
        rows["ids"],
        rows["labels"],
        rows["mask"],
        positions.reshape(2, 16),
        cu_seqlens=np.cumsum((0, *LENGTHS), dtype=np.int32) if is_encoder else None,
        tokentype_ids=rows["types"] if is_encoder else None,
    )


def run_ours(config: RunConfig, folder: Path) -> tuple[float, dict[str, np.ndarray], np.ndarray | None]:
    """Entry point of a rank: loss sum, gradients of this rank's parameters, and this rank's logits without stages."""
    from megatron_7b.checkpoint.load import load_weights
    from megatron_7b.model.builder import named_canonical_parameters
    from megatron_7b.objective.microbatches import run_microbatches
    from megatron_7b.parallel.groups import broadcast_from_last_stage
    from megatron_7b.training.learner import build_learner

    core = build_learner(config, "cpu")
    chunk = core.model[0]
    chunk.train()
    load_weights(folder, core.model)
    batch = microbatch(config.model.architecture)
    totals = run_microbatches(
        core.model, [batch], core.objective, layout=core.layout, device=core.device, forward_only=False
    )
    ((loss, count),) = broadcast_from_last_stage(totals).tolist()
    gradients = {
        name: parameter.main_grad.numpy() * count for name, parameter in named_canonical_parameters([chunk.module])
    }
    logits = None
    if core.layout.pp_size == 1:
        inputs = core.objective.model_inputs(batch, core.device, core.layout)
        asked = {name: x for name, x in inputs.items() if name not in ("labels", "loss_mask")}
        with torch.no_grad():
            logits = chunk.module(**asked).flatten(0, 1).numpy()
    return loss, gradients, logits


def expected(architecture: str, *, is_tied: bool) -> tuple[float, dict[str, torch.Tensor], torch.Tensor]:
    """The same from transformers, sentence by sentence, under our names."""
    from megatron_7b.conversion import from_hugging_face

    model = reference(architecture, is_tied=is_tied)
    text, logits = sentences(), []
    lengths = (16, 16) if architecture == "gpt2" else LENGTHS
    for part in zip(*(tensor.split(lengths) for tensor in text.values()), strict=True):
        named = dict(zip(text, part, strict=True))
        types = {} if architecture == "gpt2" else {"token_type_ids": named["types"][None]}
        logits.append(model(input_ids=named["ids"][None], **types).logits[0])
    all_logits = torch.cat(logits)
    losses = torch.nn.functional.cross_entropy(all_logits, text["labels"], reduction="none")
    loss = (losses * text["mask"]).sum()
    loss.backward()
    # A bias that transformers keeps and does not compute with has none.
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }
    config = model_config(architecture, is_tied=is_tied).model
    return loss.item(), dict(from_hugging_face(gradients, config, VOCAB_SIZE)), all_logits.detach()


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ["gpt2", "bert", "megatron-bert"])
def test_logits_loss_and_gradients_are_those_of_transformers(architecture: str, is_tied: bool, tmp_path: Path) -> None:
    run_ranks(1, write_reference, architecture, is_tied, tmp_path)
    loss, gradients, logits = expected(architecture, is_tied=is_tied)
    table = parameter_table(model_config(architecture, is_tied=is_tied).model, VOCAB_SIZE)
    for layout in LAYOUTS.values():
        config = model_config(architecture, is_tied=is_tied, **layout)
        tp = layout.get("tensor_model_parallel_size", 1)
        world = tp * layout.get("pipeline_model_parallel_size", 1)
        results = run_ranks(world, run_ours, config, resolve_checkpoint(tmp_path))
        for ours in results:
            assert ours[0] == pytest.approx(loss, rel=2e-6)
        if results[0][2] is not None:
            whole = np.concatenate([ours[2] for ours in results], axis=-1)[:, :VOCAB_SIZE]
            np.testing.assert_allclose(whole, logits.numpy(), rtol=1e-4, atol=2e-5)
        seen = set()
        for rank, ours in enumerate(results):
            for name, gradient in ours[1].items():
                seen.add(name)
                right = shard(table[name], gradients[name], gradient.shape, rank % tp, tp)
                np.testing.assert_allclose(gradient, right, rtol=1e-4, atol=3e-5, err_msg=name)
        assert seen == set(gradients) == set(table)


def shard(parameter: Parameter, whole: torch.Tensor, shape: tuple[int, ...], tp_rank: int, tp_size: int) -> np.ndarray:
    """This tensor rank's part of a gradient, vocabulary padding included."""
    if parameter.is_padded:
        whole = torch.cat([whole, torch.zeros(shape[0] * tp_size - len(whole), *shape[1:])])
    if parameter.arrangement == "gate_up":
        return torch.cat([whole[first:end] for first, end in shard_ranges(parameter, tp_rank, tp_size)]).numpy()
    return (whole if parameter.tp_dim is None else whole.chunk(tp_size, dim=parameter.tp_dim)[tp_rank]).numpy()
