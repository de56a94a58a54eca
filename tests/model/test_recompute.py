"""Selective recompute of each module: the same numbers, computed twice, and less that is kept."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.ranks import run_ranks
from tests.support.tiny_runs import build, run_steps, tiny_config

MOE = {"num_moe_experts": 4, "moe_ffn_hidden_size": 32, "moe_router_topk": 2, "architecture": "mixtral"}
NONE: dict[str, Any] = {}


def selective(*modules: str) -> dict[str, Any]:
    return {"recompute_granularity": "selective", "recompute_modules": modules}


def watch(parallel: dict[str, Any], model: dict[str, Any]) -> tuple[list[tuple[float, float]], Counter[str], int]:
    """Entry point of a rank: losses and norms of steps, how often modules were called in one, and the bytes it kept."""
    learner = build(tiny_config(parallel=parallel, model=model, training={"micro_batch_size": 8}))
    results = run_steps(learner, range(2))
    calls: Counter[str] = Counter()
    for name, module in learner.model[0].named_modules():
        *_, last = name.split(".")
        if last in ("mlp", "core_attention", "input_layernorm"):
            module.register_forward_hook(lambda *_, last=last: calls.update([last]))
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor
        return tensor

    weights = {weight.data_ptr() for weight in learner.model[0].parameters()}
    held = []
    learner.model[0].module.register_forward_hook(
        # After the whole forward pass: outputs that are dropped have given their memory back.
        lambda *_: held.append(
            sum(one.untyped_storage().nbytes() for place, one in kept.items() if place not in weights)
        )
    )
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        results += run_steps(learner, range(2, 3))
    return results, calls, held[0]


CASES = {
    "core_attn": (("core_attn",), NONE, {"core_attention": 2}),
    "mlp": (("mlp",), NONE, {"mlp": 2}),
    "core_attn and mlp": (("core_attn", "mlp"), {"add_qkv_bias": True}, {"core_attention": 2, "mlp": 2}),
    "moe": (("moe",), MOE, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_modules_are_computed_again_and_nothing_else_changes(name: str) -> None:
    modules, model, times = CASES[name]
    ((plain, once, kept_before),) = run_ranks(1, watch, {}, model)
    ((recomputed, calls, kept),) = run_ranks(1, watch, selective(*modules), model)
    assert recomputed == plain
    assert {module: calls[module] // once[module] for module in once} == {**dict.fromkeys(once, 1), **times}
    assert kept < kept_before


def test_layouts_agree_with_everything_recomputed() -> None:
    modules = selective("core_attn", "mlp")
    (expected, _, _) = run_ranks(1, watch, {}, {})[0]
    sharded = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    for actual, _, _ in run_ranks(2, watch, {**sharded, **modules}, {}):
        for (loss, norm), (right, right_norm) in zip(actual, expected, strict=True):
            assert loss == pytest.approx(right, rel=1e-5)
            assert norm == pytest.approx(right_norm, rel=1e-4)
