"""The older architectures at every layout: losses and gradient norms against one rank, in FP32; and runs in BF16."""

from collections.abc import Callable
from typing import Any

import pytest

from megatron_7b.config.schema import RunConfig
from tests.distributed.test_layout_equivalence import largest_difference
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import tiny_config, train

NUM_STEPS = 10
TOLERANCE = 1e-5
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
SHARDED = {"use_distributed_optimizer": True}

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, TP2),
    "TP2+SP": (2, {**TP2, "sequence_parallel": True}),
    "PP2": (2, PP2),
    "PP2xVPP2": (2, {**PP2, "virtual_pipeline_model_parallel_size": 2}),
    "DP2+distributed optimizer+overlap": (
        2, {**SHARDED, "overlap_grad_reduce": True, "overlap_param_gather": True}
    ),
    "TP2xPP2+SP": (4, {**TP2, **PP2, "sequence_parallel": True}),
    "DP2+distributed optimizer": (2, SHARDED),
    "TP2xPP2xDP2+SP": (8, {**TP2, **PP2, **SHARDED, "sequence_parallel": True}),
    "CP2": (2, {"context_parallel_size": 2}),
    "full recompute": (1, {"recompute_granularity": "full"}),
    "selective recompute, TP2": (2, {**TP2, "recompute_granularity": "selective"}),
}  # fmt: skip
PAIRS = "bert, sentence pairs"
ALONE = ("full recompute", "selective recompute, TP2", "PP2xVPP2", "DP2+distributed optimizer+overlap")
"""What pairs share with other encoders."""
CASES = [
    (architecture, layout)
    for architecture in ("bert", "megatron-bert", "gpt2", PAIRS)
    for layout in LAYOUTS
    if layout != "CP2" and (architecture != PAIRS or layout not in ALONE)
] + [("gpt2", "CP2")]


def config(architecture: str, *, is_tied: bool = True, **sections: dict[str, Any]) -> RunConfig:
    has_pairs = architecture == PAIRS
    architecture = "bert" if has_pairs else architecture
    if has_pairs:
        sections["objective"] = {"sentence_pairs": "sentence_order"}
    model = {
        "add_binary_head": has_pairs,
        "architecture": architecture,
        "num_query_groups": None,
        "num_tokentypes": 2 if "bert" in architecture else 0,
        "max_position_embeddings": 32,
        "share_embeddings_and_output_weights": is_tied,
    }
    # At the usual 1e-2, the loss of norms after layers jumps in the ninth step, and rounding with it. At the usual
    # epsilon, gradients that are nothing but rounding (as of key biases, which softmax does not see) make whole steps.
    return tiny_config(model=model, optimizer={"lr": 3e-3, "adam_eps": 1e-6}, **sections)


@pytest.fixture(scope="module")
def one_rank() -> dict[str, list[tuple[float, float]]]:
    return {name: run_ranks(1, train, config(name), NUM_STEPS)[0] for name in dict.fromkeys(one for one, _ in CASES)}


@pytest.mark.parametrize(("architecture", "name"), CASES)
def test_layout_gives_the_same_losses(
    architecture: str,
    name: str,
    one_rank: dict[str, list[tuple[float, float]]],
    record_property: Callable[[str, object], None],
) -> None:
    world_size, parallel = LAYOUTS[name]
    expected = one_rank[architecture]
    assert expected[-1][0] < 0.9 * expected[0][0], "it learns nothing"
    of_ranks = run_ranks(world_size, train, config(architecture, parallel=parallel), NUM_STEPS)
    loss, norm = (max(largest_difference(steps, expected, column) for steps in of_ranks) for column in (0, 1))
    record_property(
        f"table: older architectures, largest relative difference from one rank over {NUM_STEPS} FP32 steps",
        f"{architecture:20} {name:34} {world_size} ranks   loss {loss:.1e}   gradient norm {norm:.1e}",
    )
    assert loss < TOLERANCE
    assert norm < 1e-4


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_an_output_layer_of_its_own(architecture: str) -> None:
    (expected,) = run_ranks(1, train, config(architecture, is_tied=False), 4)
    for steps in run_ranks(4, train, config(architecture, is_tied=False, parallel={**TP2, **PP2}), 4):
        assert [loss for loss, _ in steps] == pytest.approx([loss for loss, _ in expected], rel=TOLERANCE)
        assert [norm for _, norm in steps] == pytest.approx([norm for _, norm in expected], rel=1e-4)


@pytest.mark.parametrize("architecture", ["bert", "megatron-bert", "gpt2", PAIRS])
def test_bf16_stays_near(
    architecture: str,
    one_rank: dict[str, list[tuple[float, float]]],
    record_property: Callable[[str, object], None],
) -> None:
    layout = {**TP2, **PP2, "sequence_parallel": True}
    run = config(architecture, precision={"params_dtype": "bf16"}, parallel=layout)
    of_ranks = run_ranks(4, train, run, NUM_STEPS)
    loss = max(largest_difference(steps, one_rank[architecture], 0) for steps in of_ranks)
    record_property(
        f"table: older architectures in BF16 at TP2xPP2+SP against FP32 on one rank, {NUM_STEPS} steps",
        f"{architecture:20} loss {loss:.1e}",
    )
    assert loss < 0.02
