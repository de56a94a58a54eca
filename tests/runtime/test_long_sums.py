"""Norms of many numbers against FP64, and the gradient norm of a run that is made of them."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from megatron_7b.runtime.long_sums import l2_norm
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import run_steps, tiny_config


def numbers(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 1025, 3_600_000, 33_554_432 + 7])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e12])
def test_no_size_loses_digits(size: int, scale: float) -> None:
    values = numbers(size, scale=scale)
    expected = math.sqrt(float(np.square(values.numpy(), dtype=np.float64).sum()))
    assert l2_norm([values]) == pytest.approx(expected, rel=1e-7, abs=0)


def test_many_tensors_of_any_layout_and_format() -> None:
    tensors = [numbers(3, 5), numbers(700, 1000).t(), numbers(50_000).bfloat16(), numbers(4, 6)[:, ::2], torch.empty(0)]
    expected = math.sqrt(math.fsum(float(value) ** 2 for tensor in tensors for value in tensor.double().flatten()))
    assert l2_norm(tensors) == pytest.approx(expected, rel=1e-7, abs=0)
    assert l2_norm([]) == 0.0


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("size", [10, 5000])
def test_what_is_not_finite_shows(value: float, size: int) -> None:
    values = torch.ones(size)
    values[3] = value
    assert not math.isfinite(l2_norm([torch.ones(2), values]))


# The embedding and the output layer have 3.6 M elements each: enough for FP32 sums to be off by 1e-4.
WIDE = {"hidden_size": 72, "num_attention_heads": 3, "num_query_groups": 3, "vocab_size": 50257}


def _norms(parallel: dict[str, Any]) -> tuple[float, float]:
    """Entry point of a rank: the gradient norm that the first step reports, and that of this rank's buffers in FP64."""
    from megatron_7b.training.learner import build_learner

    core = build_learner(tiny_config(model=WIDE, parallel=parallel, optimizer={"clip_grad": 0.0}), "cpu")
    ((_, norm),) = run_steps(core, range(1))
    gradients = [parameter.main_grad.numpy() for chunk in core.model for parameter in chunk.parameters()]
    return norm, math.sqrt(math.fsum(float(np.square(one, dtype=np.float64).sum()) for one in gradients))


def test_the_gradient_norm_is_exact_and_the_same_at_every_layout() -> None:
    ((norm, exact),) = run_ranks(1, _norms, {})
    assert norm == pytest.approx(exact, rel=2e-7)
    for parallel in ({"tensor_model_parallel_size": 3}, {"use_distributed_optimizer": True}):
        for of_layout, _ in run_ranks(3 if "tensor_model_parallel_size" in parallel else 2, _norms, parallel):
            assert of_layout == pytest.approx(exact, rel=1e-6)
