"""Norms by group: they add up to the norm of all gradients, and no layout changes them."""

import math

import pytest

from megatron_7b.config.schema import RunConfig
from megatron_7b.training.norms import Norms, group_of
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import batches, build, tiny_config

TIED = {"share_embeddings_and_output_weights": True, "qk_layernorm": True, "add_qkv_bias": True}
MOE = {"architecture": "mixtral", "num_moe_experts": 4, "moe_router_topk": 2}
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
LAYOUTS = {
    "TP2+SP": (2, {**TP2, "sequence_parallel": True}, {}),
    "PP2": (2, PP2, {}),
    "DP2": (2, {}, {}),
    "DP2, distributed optimizer": (2, {"use_distributed_optimizer": True}, {}),
    "TP2xPP2, tied": (4, {**TP2, **PP2}, TIED),
    "EP2, distributed optimizer": (2, {"expert_model_parallel_size": 2, "use_distributed_optimizer": True}, MOE),
}


def norms(config: RunConfig) -> tuple[Norms, Norms, float]:
    """Entry point of a rank: norms of the second step by group, of the first by layer, and the second's of all."""
    from megatron_7b.training.step import train_step

    learner, found = build(config), []
    layout = learner.layout
    for step, norms_by in enumerate(("layers", "groups")):
        rows = batches(config, step, dp_rank=layout.dp_rank, dp_size=layout.dp_size)
        result = train_step(learner, rows, 1e-3, norms_by)
        assert result.norms is not None
        found.append(result.norms)
    return found[1], found[0], result.grad_norm


@pytest.fixture(scope="module")
def one_rank() -> dict[str, tuple[Norms, Norms, float]]:
    models = {"": {}, "tied": TIED, "moe": MOE}
    return {name: run_ranks(1, norms, tiny_config(model=model))[0] for name, model in models.items()}


def together(of_groups: dict[str, float]) -> float:
    return math.sqrt(sum(norm**2 for norm in of_groups.values()))


def test_groups_and_layers_add_up(one_rank: dict[str, tuple[Norms, Norms, float]]) -> None:
    by_group, by_layer, whole = one_rank[""]
    assert set(by_group.gradients) == {"embedding", "attention", "mlp", "norms", "head"}
    assert together(dict(by_group.gradients)) == pytest.approx(whole, rel=1e-5)
    layers = {f"decoder_{layer}_{group}" for layer in range(4) for group in ("attention", "mlp", "norms")}
    assert set(by_layer.gradients) == layers | {"embedding", "norms", "head"}
    attention = {name: norm for name, norm in by_layer.parameters.items() if name.endswith("attention")}
    assert together(attention) == pytest.approx(by_group.parameters["attention"], rel=1e-2)  # an update apart
    assert by_group.parameters["norms"] == pytest.approx(math.sqrt(9 * 64), rel=1e-2)  # nine norms of ones
    assert "head" not in one_rank["tied"][0].gradients
    assert by_group.values["grad_norm_mlp"] == by_group.gradients["mlp"]
    assert by_group.values["parameter_norm_mlp"] == by_group.parameters["mlp"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_layout_changes_them(name: str, one_rank: dict[str, tuple[Norms, Norms, float]]) -> None:
    world_size, parallel, model = LAYOUTS[name]
    expected = one_rank["tied" if model is TIED else "moe" if model is MOE else ""]
    for found in run_ranks(world_size, norms, tiny_config(model=model, parallel=parallel)):
        for ours, right in zip(found[:2], expected[:2], strict=True):
            assert list(ours.gradients) == list(right.gradients)
            assert ours.values == pytest.approx(right.values, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "group", "by_layer"),
    [
        ("decoder.layers.3.self_attention.q_layernorm.weight", "norms", "decoder_3_norms"),
        ("decoder.layers.3.cross_attention.linear_kv.weight", "attention", "decoder_3_attention"),
        ("encoder.relative_pos_emb.weight", "attention", "attention"),
        ("decoder.layers.12.mlp.experts.7.linear_fc1.weight", "mlp", "decoder_12_mlp"),
        ("embedding.norm.weight", "norms", "norms"),
        ("embedding.position_embeddings.weight", "embedding", "embedding"),
        ("decoder.final_norm.weight", "norms", "norms"),
        ("lm_head.weight", "head", "head"),
        ("output_layer.bias", "head", "head"),
        ("distillation.layers.3.weight", "projections", "distillation_3_projections"),
        ("distillation.embedding.weight", "projections", "projections"),
    ],
)
def test_a_name_tells_the_group(name: str, group: str, by_layer: str) -> None:
    assert group_of(name, by_layer=False) == group
    assert group_of(name, by_layer=True) == by_layer
