"""Adapters on every kind of model: layouts agree in losses and gradient norms, and the model stays as it is."""

from typing import Any

import pytest

from megatron_7b.config.schema import RunConfig
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import build, run_steps, tiny_config

TP2: dict[str, Any] = {"tensor_model_parallel_size": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": TP2,
    "TP2 SP": {**TP2, "sequence_parallel": True},
    "PP2": {"pipeline_model_parallel_size": 2},
    "PP2 recomputed": {"pipeline_model_parallel_size": 2, "recompute_granularity": "full"},
    "DP2 shared": {"use_distributed_optimizer": True},
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"architecture": "gpt2", "num_query_groups": None, "share_embeddings_and_output_weights": True},
    "bert": {"architecture": "bert", "num_query_groups": None},
    "t5": {"architecture": "t5", "num_query_groups": None, "num_layers": 2},
}


def train_adapter(config: RunConfig, steps: int) -> tuple[list[tuple[float, float]], bool]:
    """Entry point of a rank: return the results of the steps, and whether only what the adapter adds has changed."""
    from megatron_7b.model.builder import named_canonical_parameters

    learner = build(config)
    adapter, chunks = learner.on_ranks.adapter, learner.on_ranks.chunks
    for chunk in chunks:
        adapter.settle(chunk)
    before = {name: parameter.detach().clone() for name, parameter in named_canonical_parameters(chunks)}
    results = run_steps(learner, range(steps))
    changed = {name for name, values in named_canonical_parameters(chunks) if not values.equal(before[name])}
    return results, changed == before.keys() & learner.on_ranks.adapter_names


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "adapter",
    [{"method": "lora", "use_rslora": True}, {"method": "dora", "target_modules": ("{names}",)}],
    ids=["rsLoRA", "DoRA of some"],
)
def test_layouts_agree(model: str, adapter: dict[str, Any]) -> None:
    some = {
        "llama": ("q_proj", "v_proj", "up_proj", "o_proj"),
        "gpt2": ("c_attn", "mlp.c_proj"),
        "bert": ("key", "dense"),
        "t5": ("k", "wo", "wi_1"),
    }
    if "target_modules" in adapter:
        adapter = {**adapter, "target_modules": some[model]}
    adapter = {**adapter, "rank": 4, "alpha": 8.0}
    parts: dict[str, Any] = {"model": MODELS[model], "adapter": adapter, "optimizer": {"lr": 3e-3}}
    ((expected, only_own_changed),) = run_ranks(1, train_adapter, tiny_config(**parts), 4)
    assert only_own_changed
    for name, parallel in LAYOUTS.items():
        if model == "t5" and "PP2" in name:
            continue
        for found, only_own_changed in run_ranks(2, train_adapter, tiny_config(**parts, parallel=parallel), 4):
            assert only_own_changed, name
            for values, others in zip(found, expected, strict=True):
                assert values == pytest.approx(others, rel=1e-5), name
