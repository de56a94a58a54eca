"""Saving, resuming and resharding on real ranks: bit for bit at the same layout, within FP32 rounding at any other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoint_runs import digest_after, resume_train, train_save
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import tiny_config

SAVED_AT, END = 3, 6
TABLE = f"table: saved at step {SAVED_AT}, resumed to step {END}"

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP1": (1, {}),
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "PP3, uneven": (3, {"pipeline_model_parallel_size": 3}),
    "PP2xVPP2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "DP2": (2, {}),
    "DP2+distributed optimizer+overlap": (
        2,
        {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
    ),
    "TP2xPP2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "TP2xPP2+distributed optimizer": (
        4,
        {
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "sequence_parallel": True,
            "use_distributed_optimizer": True,
        },
    ),
}


@pytest.fixture(scope="module")
def reference() -> list[tuple[float, float]]:
    """Losses and gradient norms of an uninterrupted run on one rank."""
    ((results, _),) = run_ranks(1, digest_after, tiny_config(), END)
    return results


@pytest.mark.parametrize("name", ["TP1", "TP2xPP2", "DP2+distributed optimizer+overlap"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    name: str, dtype: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    world_size, parallel = LAYOUTS[name]
    config = tiny_config(parallel=parallel, precision={"params_dtype": dtype})
    uninterrupted = run_ranks(world_size, train_save, config, tmp_path, SAVED_AT, END)
    resumed = run_ranks(world_size, resume_train, config, tmp_path, END)
    assert [digest for _, digest in resumed] == [digest for _, digest in uninterrupted]
    assert resumed[0][0] == uninterrupted[0][0][SAVED_AT:]
    record_property(TABLE, f"{name:30} -> itself, {dtype}: weights and optimizer state equal bit for bit")


@pytest.mark.parametrize("target", LAYOUTS)
def test_every_layout_resumes_from_tp2_pp2(
    target: str, shared_checkpoint: Path, reference: Any, record_property: Callable[[str, object], None]
) -> None:
    difference = _check_continuation(target, shared_checkpoint, reference)
    record_property(TABLE, f"{'TP2xPP2':30} -> {target:30} largest relative difference of a loss {difference:.1e}")


@pytest.fixture(scope="module")
def shared_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tp2_pp2")
    world_size, parallel = LAYOUTS["TP2xPP2"]
    run_ranks(world_size, train_save, tiny_config(parallel=parallel), folder, SAVED_AT)
    return folder


@pytest.mark.parametrize("source", [name for name in LAYOUTS if name != "TP2xPP2"])
def test_one_rank_resumes_from_every_layout(
    source: str, tmp_path: Path, reference: Any, record_property: Callable[[str, object], None]
) -> None:
    world_size, parallel = LAYOUTS[source]
    run_ranks(world_size, train_save, tiny_config(parallel=parallel), tmp_path, SAVED_AT)
    difference = _check_continuation("TP1", tmp_path, reference)
    record_property(TABLE, f"{source:30} -> {'TP1':30} largest relative difference of a loss {difference:.1e}")


def _check_continuation(layout: str, folder: Path, reference: list[tuple[float, float]]) -> float:
    """Resume at a layout and return the largest relative difference of a loss from the uninterrupted run."""
    world_size, parallel = LAYOUTS[layout]
    largest = 0.0
    for results, _ in run_ranks(world_size, resume_train, tiny_config(parallel=parallel), folder, END):
        for (loss, norm), (expected_loss, expected_norm) in zip(results, reference[SAVED_AT:], strict=True):
            largest = max(largest, abs(loss - expected_loss) / expected_loss)
            assert loss == pytest.approx(expected_loss, rel=1e-5)
            assert norm == pytest.approx(expected_norm, rel=1e-4)
    return largest


def test_padding_for_another_tensor_size_changes_nothing(tmp_path: Path) -> None:
    """509 tokens are padded to 512 on one rank, and to 528 for three."""
    shape = {"num_attention_heads": 3, "num_query_groups": 3, "hidden_size": 96, "ffn_hidden_size": 96}
    ((expected, _),) = run_ranks(1, train_save, tiny_config(model=shape), tmp_path, SAVED_AT, END)
    three = tiny_config(model=shape, parallel={"tensor_model_parallel_size": 3})
    for results, _ in run_ranks(3, resume_train, three, tmp_path, END):
        assert [loss for loss, _ in results] == pytest.approx([loss for loss, _ in expected[SAVED_AT:]], rel=1e-5)


def test_dropout_resumes_exactly(tmp_path: Path) -> None:
    config = tiny_config(model={"hidden_dropout": 0.1, "attention_dropout": 0.1})
    ((expected, digest),) = run_ranks(1, digest_after, config, END)
    run_ranks(1, train_save, config, tmp_path, SAVED_AT)
    ((results, resumed),) = run_ranks(1, resume_train, config, tmp_path, END)
    assert (results, resumed) == (expected[SAVED_AT:], digest)
