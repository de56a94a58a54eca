"""Each optimizer resumes bit for bit at its layout and within rounding at another, or not at all as another one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_7b.checkpoint import read_manifest
from megatron_7b.config.optimizers import OPTIMIZERS
from megatron_7b.config.schema import RunConfig
from tests.support.checkpoint_runs import resume_train, saved_tensors, train_save
from tests.support.ranks import RankFailedError, run_ranks
from tests.support.tiny_runs import build, run_steps, tiny_config

SAVED_AT, END = 5, 10
TABLE = f"table: optimizers, saved at step {SAVED_AT}, resumed to step {END}"
SHARED: dict[str, Any] = {"use_distributed_optimizer": True}
TP2: dict[str, Any] = {"tensor_model_parallel_size": 2}

LAYOUTS: dict[str, tuple[int, dict[str, Any], str]] = {
    "1 rank": (1, {}, "fp32"),
    "TP2": (2, TP2, "fp32"),
    "PP2": (2, {"pipeline_model_parallel_size": 2}, "fp32"),
    "DP2+distributed optimizer": (2, SHARED, "fp32"),
    "DP2+distributed optimizer, BF16": (2, SHARED, "bf16"),
    "1 rank, BF16": (1, {}, "bf16"),
}
ELSEWHERE = {"TP2": "DP2+distributed optimizer", "DP2+distributed optimizer": "1 rank", "1 rank": "TP2"}


def config_of(name: str, layout: str) -> tuple[int, RunConfig]:
    world_size, parallel, dtype = LAYOUTS[layout]
    return world_size, tiny_config(optimizer={"name": name}, parallel=parallel, precision={"params_dtype": dtype})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ten_steps_are_five_and_five(
    name: str, layout: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    world_size, config = config_of(name, layout)
    whole = run_ranks(world_size, train_save, config, tmp_path, SAVED_AT, END)
    resumed = run_ranks(world_size, resume_train, config, tmp_path, END)
    expected = whole[0][0][SAVED_AT:]
    assert [digest for _, digest in resumed] == [digest for _, digest in whole]
    assert resumed[0][0] == expected
    record_property(TABLE, f"{name:6} {layout:32} -> itself: weights and optimizer state equal bit for bit")
    if layout in ELSEWHERE:
        world_size, config = config_of(name, ELSEWHERE[layout])
        results = run_ranks(world_size, resume_train, config, tmp_path, END)[0][0]
        difference = max(abs(a - b) / b for (a, _), (b, _) in zip(results, expected, strict=True))
        assert difference < 1e-5
        record_property(
            TABLE, f"{name:6} {layout:32} -> {ELSEWHERE[layout]}: largest difference of a loss {difference:.1e}"
        )


def test_a_checkpoint_says_whose_state_it_holds(tmp_path: Path) -> None:
    run_ranks(2, train_save, config_of("muon", "TP2")[1], tmp_path, 2)
    manifest = read_manifest(tmp_path / "latest")
    assert (manifest.optimizer, manifest.optimizer_scalars) == ("muon", {"num_updates": 2})
    kinds: dict[str, set[str]] = {}
    for name in saved_tensors(tmp_path / "latest"):
        if name.startswith("optimizer.state."):
            kind, _, parameter = name.removeprefix("optimizer.state.").partition(".")
            kinds.setdefault(parameter, set()).add(kind)
    assert kinds.pop("decoder.layers.1.mlp.linear_fc1.weight") == {"momentum_buffer"}
    for parameter in ("embedding.word_embeddings.weight", "output_layer.weight", "decoder.final_norm.weight"):
        assert kinds.pop(parameter) == {"exp_avg", "exp_avg_sq"}


def resume_as_another(folder: Path, name: str, on_change: Any, num_steps: int) -> tuple[int, list[tuple[float, float]]]:
    """Entry point of a rank: resume with another optimizer; return its updates and (loss, norm) of the steps."""
    from megatron_7b.checkpoint import resolve_checkpoint
    from megatron_7b.checkpoint.load import load_checkpoint

    trainer = build(config_of(name, "1 rank")[1])
    load_checkpoint(
        resolve_checkpoint(folder),
        chunks=trainer.model,
        optimizer=trainer.optimizer,
        layout=trainer.layout,
        on_optimizer_change=on_change,
    )
    return trainer.optimizer.num_updates, run_steps(trainer, range(2, 2 + num_steps))


def test_another_optimizer_is_refused_or_begins_anew(tmp_path: Path) -> None:
    ((expected, _),) = run_ranks(1, train_save, config_of("adamw", "1 rank")[1], tmp_path, 2, 3)
    with pytest.raises(RankFailedError, match=r"state of optimizer.name adamw, this start has optimizer.name adam\b"):
        run_ranks(1, resume_as_another, tmp_path, "adam", "refuse", 1)
    for name in ("adam", "sgd", "muon"):
        ((num_updates, results),) = run_ranks(1, resume_as_another, tmp_path, name, "restart", 2)
        assert num_updates == 0
        assert results[0] == expected[2]  # the weights are the checkpoint's
        assert torch.tensor(results).isfinite().all()
