"""AdaLoRA's budget, and runs that resume in every phase of it. Its training against PEFT's is in test_peft.py."""

from pathlib import Path
from typing import Any

import pytest

from megatron_7b.adapter.adalora import RankBudget
from megatron_7b.config import check_config
from megatron_7b.config.adapters import AdapterConfig
from megatron_7b.errors import ConfigError
from tests.support.checkpoint_runs import resume_train, train_save
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import tiny_config

ADAPTER: dict[str, Any] = {
    "method": "adalora", "initial_rank": 4, "target_rank": 2, "tinit": 1, "tfinal": 2, "orth_reg_weight": 0.1,
    "target_modules": ("q_proj", "down_proj"),
}  # fmt: skip
SHARED = {"use_distributed_optimizer": True}


def test_the_budget_is_that_of_peft() -> None:
    from types import SimpleNamespace

    from peft.tuners.adalora.layer import RankAllocator

    adapter = AdapterConfig(method="adalora", initial_rank=12, target_rank=5, tinit=3, tfinal=6, delta_t=2)
    budget = RankBudget(adapter=adapter, num_updates=7, total_steps=30)
    theirs: Any = RankAllocator.__new__(RankAllocator)
    theirs.peft_config = SimpleNamespace(tinit=3, tfinal=6, total_step=30, deltaT=2)
    theirs.init_bgt, theirs.target_bgt = 84, 35
    for step in range(1, 24):
        number, is_due = theirs.budget_schedule(step)
        assert budget.after(step) == (number if is_due else None)
    assert [budget.after(step) for step in (24, 25, 30)] == [35, None, None]
    assert [budget.phase(step) for step in (23, 24, 25)] == ["choosing", "chosen", "fixed"]


@pytest.mark.parametrize(
    ("size", "parallel", "saved"),
    [(1, {}, 4), (2, {"tensor_model_parallel_size": 2}, 7), (2, SHARED, 7)],
    ids=["TP1 while ranks fall", "TP2 at the end", "DP2 shared at the end"],
)
def test_a_run_resumes_bit_for_bit(size: int, parallel: dict[str, Any], saved: int, tmp_path: Path) -> None:
    config = tiny_config(adapter=ADAPTER, parallel=parallel, training={"train_steps": 8})
    straight = run_ranks(size, train_save, config, tmp_path, saved, 8)
    resumed = run_ranks(size, resume_train, config, tmp_path, 8)
    for (results, digest), (results_again, digest_again) in zip(straight, resumed, strict=True):
        assert results[saved:] == results_again
        assert digest == digest_again


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="must be at most adapter.initial_rank = 4"):
        check_config(tiny_config(adapter={**ADAPTER, "target_rank": 5}))
    narrow = {"optimizer_state_dtype": "bf16", "params_dtype": "bf16"}
    with pytest.raises(ConfigError, match="does not go with adapter.method adalora"):
        check_config(tiny_config(adapter=ADAPTER, precision=narrow, parallel=SHARED))
