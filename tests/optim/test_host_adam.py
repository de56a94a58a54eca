"""Moments in host memory: torch's numbers bit for bit, in runs, layouts and checkpoints, too."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_7b.optim import host_adam, optimizer
from megatron_7b.optim.host_adam import HostAdam
from tests.support.checkpoint_runs import resume_train, train_save
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import build, run_steps, tiny_config

SHARDED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any], str]] = {
    "one rank in FP32": (1, {}, "fp32"),
    "one rank in BF16": (1, {}, "bf16"),
    "DP2 sharded in BF16": (2, SHARDED, "bf16"),
    "TP2 x DP2 sharded": (4, {**SHARDED, "tensor_model_parallel_size": 2}, "fp32"),
}


@pytest.mark.parametrize("decoupled", [True, False])
def test_updates_are_torchs(decoupled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_adam, "SLICE", 128)  # whole vectors: the rest of an array is rounded otherwise
    draw = torch.Generator().manual_seed(2)
    shapes = [(7, 40), (127,), (128,), (1,), (3,)]
    own, right = ([torch.randn(s, generator=torch.Generator().manual_seed(9)) for s in shapes] for _ in range(2))
    settings = {"betas": (0.8, 0.97), "eps": 1e-6, "lr": 0.01}
    rates = [(slice(0, 2), 0.1), (slice(2, 5), 0.0)]
    groups = [{"params": own[part], "weight_decay": decay, **settings} for part, decay in rates]
    right_groups = [{"params": right[part], "weight_decay": decay, **settings} for part, decay in rates]
    host = HostAdam(groups, decoupled=decoupled)
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    plain = kind(right_groups, fused=True)
    for number in range(4):
        for mine, other in zip(own, right, strict=True):
            mine.grad = torch.randn(mine.shape, generator=draw)
            other.grad = mine.grad.clone()
        if number == 2:  # a parameter that no token has reached
            own[3].grad = right[3].grad = None
        for group in (*host.param_groups, *plain.param_groups):
            group["lr"] = 0.01 / (1 + number)
        host.step()
        plain.step()
    for mine, other in zip(own, right, strict=True):
        assert torch.equal(mine, other)
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(host.state[mine][name], plain.state[other][name])


def keep_on_host(config: Any, part: Any) -> bool:
    del part
    return bool(config.optimizer.cpu_offload)


def steps_of(cpu_offload: bool, parallel: dict[str, Any], dtype: str) -> list[tuple[float, float]]:
    """Entry point of a rank, on which moments are kept as if parameters were on a GPU."""
    optimizer.keeps_moments_on_host = keep_on_host
    config = tiny_config(parallel=parallel, precision={"params_dtype": dtype}, optimizer={"cpu_offload": cpu_offload})
    learner = build(config)
    kinds = {type(inner) for inner in learner.optimizer.torch_optimizers()}
    assert (HostAdam in kinds) == cpu_offload
    return run_steps(learner, range(4))


@pytest.mark.parametrize("name", LAYOUTS)
def test_runs_are_the_same(name: str) -> None:
    world_size, parallel, dtype = LAYOUTS[name]
    plain = run_ranks(world_size, steps_of, False, parallel, dtype)
    assert run_ranks(world_size, steps_of, True, parallel, dtype) == plain


def resumed(cpu_offload: bool, folder: Path) -> Any:
    optimizer.keeps_moments_on_host = keep_on_host
    return resume_train(config_of(cpu_offload), folder, 4)


def saved(cpu_offload: bool, folder: Path) -> Any:
    optimizer.keeps_moments_on_host = keep_on_host
    return train_save(config_of(cpu_offload), folder, 2, 4)


def config_of(cpu_offload: bool) -> Any:
    return tiny_config(parallel=SHARDED, precision={"params_dtype": "bf16"}, optimizer={"cpu_offload": cpu_offload})


def test_checkpoints_know_no_difference(tmp_path: Path) -> None:
    for cpu_offload in (True, False):
        folder = tmp_path / str(cpu_offload)
        whole = run_ranks(2, saved, cpu_offload, folder)
        for other in (True, False):
            assert [digest for _, digest in run_ranks(2, resumed, other, folder)] == [digest for _, digest in whole]
