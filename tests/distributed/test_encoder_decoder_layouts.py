"""T5 at every layout: losses and gradient norms of ten steps against one rank, in FP32; resuming; a run in BF16."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_7b.config.schema import RunConfig
from tests.distributed.test_layout_equivalence import NUM_STEPS, TOLERANCE, largest_difference
from tests.support.checkpoint_runs import resume_train, train_save
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import tiny_config, train

TP2, SHARDED = {"tensor_model_parallel_size": 2}, {"use_distributed_optimizer": True}
OVERLAP = {**SHARDED, "overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, TP2),
    "TP2+SP": (2, {**TP2, "sequence_parallel": True}),
    "DP2+distributed optimizer": (2, SHARDED),
    "TP2xDP2+SP+distributed optimizer+overlap": (4, {**TP2, **OVERLAP, "sequence_parallel": True}),
    "full recompute, DP2+overlap": (2, {**OVERLAP, "recompute_granularity": "full"}),
    "selective recompute, TP2": (2, {**TP2, "recompute_granularity": "selective"}),
}
TIED = ("TP2+SP", "TP2xDP2+SP+distributed optimizer+overlap", "full recompute, DP2+overlap")
CASES = [*((name, False) for name in LAYOUTS), *((name, True) for name in TIED)]


def config(*, is_tied: bool = False, **sections: dict[str, Any]) -> RunConfig:
    model = {
        "architecture": "t5",
        "num_layers": 3,
        "num_decoder_layers": 2,
        "num_query_groups": None,
        "kv_channels": 12,
        "share_embeddings_and_output_weights": is_tied,
        "scale_output_states": is_tied,
    }
    return tiny_config(model={**model, **sections.pop("model", {})}, optimizer={"lr": 4e-3}, **sections)


@pytest.fixture(scope="module")
def one_rank() -> dict[bool, list[tuple[float, float]]]:
    return {is_tied: run_ranks(1, train, config(is_tied=is_tied), NUM_STEPS)[0] for is_tied in (False, True)}


@pytest.mark.parametrize(("name", "is_tied"), CASES)
def test_layout_gives_the_same_losses(
    name: str,
    is_tied: bool,
    one_rank: dict[bool, list[tuple[float, float]]],
    record_property: Callable[[str, object], None],
) -> None:
    (world_size, parallel), expected = LAYOUTS[name], one_rank[is_tied]
    assert expected[-1][0] < 0.8 * expected[0][0], "it learns nothing"
    of_ranks = run_ranks(world_size, train, config(is_tied=is_tied, parallel=parallel), NUM_STEPS)
    loss, norm = (max(largest_difference(steps, expected, column) for steps in of_ranks) for column in (0, 1))
    record_property(
        f"table: T5, largest relative difference from one rank over {NUM_STEPS} FP32 steps",
        f"{name:40} {'tied' if is_tied else '':4} {world_size} ranks   loss {loss:.1e}   gradient norm {norm:.1e}",
    )
    assert loss < TOLERANCE
    assert norm < 1e-4


def test_bf16_stays_near(one_rank: dict[bool, list[tuple[float, float]]]) -> None:
    run = config(precision={"params_dtype": "bf16"}, parallel={**TP2, "sequence_parallel": True})
    for steps in run_ranks(2, train, run, NUM_STEPS):
        assert [loss for loss, _ in steps] == pytest.approx([loss for loss, _ in one_rank[False]], rel=0.02)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    dtype: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    run = config(
        parallel={**TP2, **SHARDED}, precision={"params_dtype": dtype},
        model={"hidden_dropout": 0.1, "attention_dropout": 0.1},
    )  # fmt: skip
    uninterrupted = run_ranks(4, train_save, run, tmp_path, 2, 4)
    resumed = run_ranks(4, resume_train, run, tmp_path, 4)
    assert [digest for _, digest in resumed] == [digest for _, digest in uninterrupted]
    assert resumed[0][0] == uninterrupted[0][0][2:]
    record_property(
        "table: T5 with dropout, saved at step 2, resumed to step 4",
        f"TP2xDP2+distributed optimizer -> itself, {dtype}: weights and optimizer state equal bit for bit",
    )


def test_one_rank_resumes_from_several(one_rank: dict[bool, list[tuple[float, float]]], tmp_path: Path) -> None:
    parallel = {**TP2, **SHARDED, "sequence_parallel": True}
    run_ranks(4, train_save, config(parallel=parallel), tmp_path, 3)
    ((results, _),) = run_ranks(1, resume_train, config(), tmp_path, 6)
    assert [loss for loss, _ in results] == pytest.approx([loss for loss, _ in one_rank[False][3:6]], rel=TOLERANCE)
