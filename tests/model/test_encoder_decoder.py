"""T5 against transformers with the same weights: logits, losses and gradients at several layouts, with padding."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_7b.checkpoint import resolve_checkpoint
from megatron_7b.config.schema import RunConfig
from megatron_7b.data import Batch
from megatron_7b.model.kinds import parameter_table
from tests.model.test_against_transformers import shard
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import tiny_config

VOCAB_SIZE, TEXT, ANSWER = 203, (37, 25), (13, 9)
"""Lengths of two texts and answers: the second of each is padded, and they fill up no multiple of anything."""

SHAPES: dict[str, dict[str, Any]] = {
    "1.1": {"architecture": "t5"},
    "1.1 tied": {"architecture": "t5", "share_embeddings_and_output_weights": True, "num_decoder_layers": 2},
    "1.0": {
        "architecture": "t5-v1.0", "share_embeddings_and_output_weights": True, "scale_output_states": True,
        "relative_attention_num_buckets": 9, "relative_attention_max_distance": 11,
    },
}  # fmt: skip
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP1": (1, {}),
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "TP2+SP": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "DP2": (2, {"use_distributed_optimizer": True}),
    "full recompute, TP2+SP": (
        2, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "recompute_granularity": "full"}
    ),
    "selective recompute": (1, {"recompute_granularity": "selective"}),
}  # fmt: skip


def run_config(shape: str, **parallel: Any) -> RunConfig:
    model = {
        "num_layers": 3, "num_query_groups": None, "kv_channels": 12, "vocab_size": VOCAB_SIZE, "norm_epsilon": 1e-6,
        **SHAPES[shape],
    }  # fmt: skip
    return tiny_config(model=model, data={"seq_length": 64}, parallel=parallel)


def reference(shape: str) -> Any:
    """A model of transformers with weights far from their usual initial values."""
    from transformers import T5Config, T5ForConditionalGeneration

    model = run_config(shape).model
    is_tied, is_scaled = model.share_embeddings_and_output_weights, model.scale_output_states
    theirs = T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCAB_SIZE, d_model=64, d_kv=12, d_ff=96, num_heads=4, num_layers=3,
            num_decoder_layers=model.decoder_layers, tie_word_embeddings=is_scaled,
            relative_attention_num_buckets=model.relative_attention_num_buckets,
            relative_attention_max_distance=model.relative_attention_max_distance,
            feed_forward_proj="relu" if shape == "1.0" else "gated-gelu",
        )
    )  # fmt: skip
    if not is_tied:  # transformers 5 ties all that it makes, but not all that it loads
        theirs.lm_head.weight = torch.nn.Parameter(torch.empty(VOCAB_SIZE, 64))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + ("layer_norm" in name))
    return theirs.float().eval()


def microbatch() -> Batch:
    """Two texts and answers."""
    random = np.random.default_rng(3)
    text, answer, labels = (random.integers(0, VOCAB_SIZE, (2, length[0])) for length in (TEXT, ANSWER, ANSWER))
    is_text, is_answer = (np.arange(length[0]) < np.array(length)[:, None] for length in (TEXT, ANSWER))
    return Batch(
        text,
        labels,
        is_answer.astype(np.float32),
        position_ids=np.zeros_like(text),
        decoder_tokens=answer,
        attention_mask=is_text,
    )


def write_reference(shape: str, folder: Path) -> None:
    """Entry point of a rank: the reference's weights as a checkpoint of ours."""
    from megatron_7b.checkpoint.weights import write_weights
    from megatron_7b.conversion import from_hugging_face

    config = run_config(shape)
    write_weights(folder, from_hugging_face(reference(shape).state_dict(), config.model, VOCAB_SIZE), config)


def run_ours(config: RunConfig, folder: Path) -> tuple[float, dict[str, np.ndarray], np.ndarray]:
    """Entry point of a rank: loss sum, gradients of this rank's parameters, and this rank's logits."""
    from megatron_7b.checkpoint.load import load_weights
    from megatron_7b.model.builder import named_canonical_parameters
    from megatron_7b.objective.microbatches import run_microbatches
    from megatron_7b.parallel.groups import sum_over_replicas
    from megatron_7b.training.learner import build_learner

    core = build_learner(config, "cpu")
    chunk = core.model[0]
    chunk.train()
    load_weights(folder, core.model)
    batch = microbatch()
    totals = run_microbatches(
        core.model, [batch], core.objective, layout=core.layout, device=core.device, forward_only=False
    )
    ((loss, count),) = sum_over_replicas(totals).tolist()
    gradients = {
        name: parameter.main_grad.numpy() * count for name, parameter in named_canonical_parameters([chunk.module])
    }
    inputs = core.objective.model_inputs(batch, core.device, core.layout)
    chunk.eval()
    with torch.no_grad():
        logits = chunk.module(**{name: x for name, x in inputs.items() if name not in ("labels", "loss_mask")})
    return loss, gradients, logits[:, : ANSWER[0]].numpy()


def expected(shape: str) -> tuple[float, dict[str, torch.Tensor], torch.Tensor]:
    """The same from transformers, under our names."""
    from megatron_7b.conversion import from_hugging_face

    theirs, batch = reference(shape), microbatch()
    assert batch.decoder_tokens is not None
    assert batch.attention_mask is not None
    logits = theirs(
        input_ids=torch.from_numpy(batch.tokens),
        attention_mask=torch.from_numpy(batch.attention_mask),
        decoder_input_ids=torch.from_numpy(batch.decoder_tokens),
    ).logits
    labels, mask = torch.from_numpy(batch.labels), torch.from_numpy(batch.loss_mask)
    loss = (torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none") * mask).sum()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    return loss.item(), dict(from_hugging_face(gradients, run_config(shape).model, VOCAB_SIZE)), logits.detach()


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_loss_and_gradients_are_those_of_transformers(shape: str, tmp_path: Path) -> None:
    run_ranks(1, write_reference, shape, tmp_path)
    loss, gradients, logits = expected(shape)
    table = parameter_table(run_config(shape).model, VOCAB_SIZE)
    for name, (world_size, parallel) in LAYOUTS.items():
        tp = parallel.get("tensor_model_parallel_size", 1)
        results = run_ranks(world_size, run_ours, run_config(shape, **parallel), resolve_checkpoint(tmp_path))
        if parallel.get("use_distributed_optimizer"):
            assert [ours[0] for ours in results] == [pytest.approx(2 * loss, rel=2e-6)] * 2
            continue
        whole = np.concatenate([ours[2] for ours in results], axis=-1)[..., :VOCAB_SIZE]
        np.testing.assert_allclose(whole, logits.numpy(), rtol=1e-4, atol=5e-5, err_msg=name)
        for rank, ours in enumerate(results):
            assert ours[0] == pytest.approx(loss, rel=2e-6)
            assert set(ours[1]) == set(gradients) == set(table)
            for parameter, gradient in ours[1].items():
                right = shard(table[parameter], gradients[parameter], gradient.shape, rank % tp, tp)
                np.testing.assert_allclose(gradient, right, rtol=1e-4, atol=5e-5, err_msg=f"{name}: {parameter}")
