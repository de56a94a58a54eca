"""Adapters on every kind of model: layouts agree in losses and gradient norms, and the model stays as it is."""

from typing import Any

import numpy as np
import pytest

from megatron_7b.config.schema import RunConfig
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import build, run_steps, tiny_config

TP2: dict[str, Any] = {"tensor_model_parallel_size": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2 SP": {**TP2, "sequence_parallel": True},
    "TP2": TP2,
    "PP2 recomputed": {"pipeline_model_parallel_size": 2, "recompute_granularity": "full"},
    "DP2 overlapped": {
        "use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True,
    },
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"architecture": "gpt2", "num_query_groups": None, "share_embeddings_and_output_weights": True},
    "bert": {"architecture": "bert", "num_query_groups": None},
    "t5": {"architecture": "t5", "num_query_groups": None, "num_layers": 2},
}
LOW_RANK = {"rank": 4, "alpha": 8.0}
CASES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "rsLoRA": ("llama", {"method": "lora", "use_rslora": True, **LOW_RANK}, tuple(LAYOUTS)),
    "DoRA of some": (
        "llama",
        {"method": "dora", "target_modules": ("q_proj", "v_proj", "up_proj", "o_proj"), **LOW_RANK},
        tuple(LAYOUTS),
    ),
    "bottleneck": ("llama", {"method": "bottleneck", "bottleneck_size": 8}, tuple(LAYOUTS)),
    "LoRA of the last layer": (
        "llama", {"method": "lora", "target_modules": ("layers.3.mlp.down_proj",)}, ("PP2 recomputed",),
    ),
    "GPT-2, DoRA": (
        "gpt2",
        {"method": "dora", "target_modules": ("c_attn", "mlp.c_proj"), **LOW_RANK},
        ("TP2 SP", "PP2 recomputed"),
    ),
    "BERT, DoRA": (
        "bert", {"method": "dora", "target_modules": ("key", "dense"), **LOW_RANK}, ("TP2", "PP2 recomputed"),
    ),
    "BERT, bottleneck": ("bert", {"method": "bottleneck", "bottleneck_activation": "relu"}, ("TP2 SP",)),
    "T5, LoRA": (
        "t5", {"method": "lora", "target_modules": ("k", "wo", "wi_1"), **LOW_RANK}, ("TP2 SP", "DP2 overlapped"),
    ),
    "whole modules": (
        "gpt2",
        {"method": "lora", "modules_to_save": ("wte",), **LOW_RANK},
        ("TP2", "PP2 recomputed", "DP2 overlapped"),
    ),
}  # fmt: skip
"""Model, adapter, and the layouts that are compared with one rank."""


def train_adapter(config: RunConfig, steps: int) -> tuple[list[tuple[float, float]], bool]:
    """Entry point of a rank: return the results of the steps, and whether exactly what is trained has changed."""
    from megatron_7b.model.builder import named_canonical_parameters
    from megatron_7b.optim.optimizer import gather_parameters

    learner = build(config)
    chunks = learner.on_ranks.chunks
    for chunk in chunks:
        learner.on_ranks.adapter.settle(chunk)
    before = {name: parameter.detach().clone() for name, parameter in named_canonical_parameters(chunks)}
    results = run_steps(learner, range(steps))
    gather_parameters(learner.model)
    changed = {name for name, values in named_canonical_parameters(chunks) if not values.equal(before[name])}
    return results, changed == before.keys() & learner.on_ranks.names_apart


@pytest.mark.parametrize("case", CASES)
def test_layouts_agree(case: str) -> None:
    model, adapter, layouts = CASES[case]
    parts: dict[str, Any] = {"model": MODELS[model], "adapter": adapter, "optimizer": {"lr": 3e-3}}
    ((expected, as_it_should),) = run_ranks(1, train_adapter, tiny_config(**parts), 4)
    assert as_it_should
    for layout in layouts:
        for found, as_it_should in run_ranks(2, train_adapter, tiny_config(**parts, parallel=LAYOUTS[layout]), 4):
            assert as_it_should, layout
            for values, others in zip(found, expected, strict=True):
                assert values == pytest.approx(others, rel=1e-5), layout


def logits_around_a_change(config: RunConfig) -> list[Any]:
    """Entry point of a rank: logits in evaluation mode, twice; then twice after the adapter has learnt."""
    import torch

    chunk = build(config).on_ranks.only_chunk
    ids, found = torch.arange(24).view(2, 12), []
    for change in (0.0, 1.0):
        chunk.train()
        for parameter in filter(lambda one: one.requires_grad, chunk.parameters()):
            parameter.data += change
        chunk.eval()
        with torch.no_grad():
            found += [chunk(ids, torch.arange(12)[None]).numpy() for _ in range(2)]
    return [*found, chunk(ids, torch.arange(12)[None]).detach().numpy()]


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_what_is_kept_between_tokens_is_forgotten_when_the_adapter_learns(method: str) -> None:
    before, again, after, after_again, computed = run_ranks(
        1, logits_around_a_change, tiny_config(adapter={"method": method})
    )[0]
    assert np.array_equal(again, before)
    assert not np.allclose(after, before, atol=1e-2)
    assert np.array_equal(after_again, after)
    assert np.array_equal(computed, after)
