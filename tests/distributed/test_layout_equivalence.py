"""Same seed, same model, whatever the layout: losses and gradient norms of ten steps against one rank, in FP32."""

import math
from collections.abc import Callable

import pytest

from tests.support.ranks import run_ranks
from tests.support.tiny_runs import VOCAB_SIZE, tiny_config, train

NUM_STEPS = 10
TOLERANCE = 1e-5

LAYOUTS = {
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "TP2+SP": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "PP2xVPP2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "PP3, stages of 1, 2 and 1": (3, {"pipeline_model_parallel_size": 3}),
    "PP2xTP2, stages of 3 and 1": (
        4,
        {
            "pipeline_model_parallel_size": 2,
            "pipeline_model_parallel_layout": (3, 1),
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "recompute_granularity": "full",
        },
    ),
    "DP2": (2, {}),
    "DP2+distributed optimizer": (2, {"use_distributed_optimizer": True}),
    "PP2xDP2+distributed optimizer+overlap": (
        4,
        {
            "pipeline_model_parallel_size": 2,
            "use_distributed_optimizer": True,
            "overlap_grad_reduce": True,
            "overlap_param_gather": True,
        },
    ),
    "TP2xPP2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "TP2xPP2xDP2": (
        8,
        {
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "sequence_parallel": True,
            "use_distributed_optimizer": True,
        },
    ),
    "CP2": (2, {"context_parallel_size": 2}),
    "CP2xTP2+SP": (4, {"context_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "CP2xPP2xDP2+distributed optimizer": (
        8,
        {"context_parallel_size": 2, "pipeline_model_parallel_size": 2, "use_distributed_optimizer": True},
    ),
    "CP4, full recompute": (4, {"context_parallel_size": 4, "recompute_granularity": "full"}),
    "full recompute": (1, {"recompute_granularity": "full"}),
    "full recompute, block, TP2+SP": (
        2,
        {
            "recompute_granularity": "full",
            "recompute_method": "block",
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
        },
    ),
    "selective recompute": (1, {"recompute_granularity": "selective"}),
}


@pytest.fixture(scope="module")
def one_rank() -> list[tuple[float, float]]:
    (steps,) = run_ranks(1, train, tiny_config(), NUM_STEPS)
    return steps


def test_first_loss_is_that_of_a_uniform_guess(one_rank: list[tuple[float, float]]) -> None:
    assert one_rank[0][0] == pytest.approx(math.log(VOCAB_SIZE), rel=0.02)
    assert one_rank[-1][0] < 0.8 * one_rank[0][0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_gives_the_same_losses(
    name: str, one_rank: list[tuple[float, float]], record_property: Callable[[str, object], None]
) -> None:
    world_size, parallel = LAYOUTS[name]
    of_ranks = run_ranks(world_size, train, tiny_config(parallel=parallel), NUM_STEPS)
    loss, norm = (max(largest_difference(steps, one_rank, column) for steps in of_ranks) for column in (0, 1))
    record_property(
        f"table: largest relative difference from one rank over {NUM_STEPS} FP32 steps",
        f"{name:36} {world_size} ranks   loss {loss:.1e}   gradient norm {norm:.1e}",
    )
    assert loss < TOLERANCE
    assert norm < 1e-4


def largest_difference(steps: list[tuple[float, float]], reference: list[tuple[float, float]], column: int) -> float:
    """Return the largest relative difference of one column over all steps."""
    return max(abs(a[column] - b[column]) / abs(b[column]) for a, b in zip(steps, reference, strict=True))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["TP2", "TP2xPP2", "PP2xDP2+distributed optimizer+overlap"])
def test_qwen_shapes_give_the_same_losses(name: str, tied: bool) -> None:
    model = {"add_qkv_bias": True, "qk_layernorm": True, "share_embeddings_and_output_weights": tied}
    (expected,) = run_ranks(1, train, tiny_config(model=model), 4)
    world_size, parallel = LAYOUTS[name]
    for steps in run_ranks(world_size, train, tiny_config(model=model, parallel=parallel), 4):
        assert [loss for loss, _ in steps] == pytest.approx([loss for loss, _ in expected], rel=TOLERANCE)
        assert [norm for _, norm in steps] == pytest.approx([norm for _, norm in expected], rel=1e-4)
