"""The run that tests on a GPU compare number formats with is itself sound: checked where there is no GPU."""

import itertools

import pytest
import torch

from tests.support.conditioned_runs import (
    BF16,
    FP32,
    LARGEST_NORM,
    NUM_STEPS,
    REFERENCE,
    TF32,
    check_curve,
    check_gradients,
    conditioned_config,
    first_gradients,
)
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import build, run_steps, train

PACKED = {"seq_length": 128, "reset_attention_mask": True}
UNCLIPPED = {"lr": 3e-4, "clip_grad": 0.0}


def test_the_reference_is_what_a_cpu_computes() -> None:
    (curve,) = run_ranks(1, train, conditioned_config("local", {"params_dtype": "fp32"}), NUM_STEPS)
    check_curve(curve, REFERENCE, FP32)


def test_it_learns_without_a_spike() -> None:
    losses, norms = zip(*REFERENCE, strict=True)
    assert losses[-1] < 0.8 * losses[0]
    assert all(after < before for before, after in itertools.pairwise(losses))
    assert max(norms) < LARGEST_NORM


def disturbed(learning_rate: float) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Entry point of a rank: the curve, and the curve from weights that were rounded as TF32 rounds them."""
    from megatron_7b.parallel.groups import leaving_process_groups

    config = conditioned_config("local", {"params_dtype": "fp32"}, optimizer={"lr": learning_rate})
    curves = []
    for size in (0.0, TF32.unit_roundoff):
        generator = torch.Generator().manual_seed(1)
        with leaving_process_groups():
            core = build(config)
            for weight in (weight for chunk in core.model for weight in chunk.parameters()):
                weight.data.mul_(1 + size * (2 * torch.rand(weight.shape, generator=generator) - 1))
            curves.append(run_steps(core, range(NUM_STEPS)))
    return curves[0], curves[1]


def test_rounding_stays_small_as_it_does_not_at_a_higher_rate() -> None:
    ((curve, other),) = run_ranks(1, disturbed, 3e-4)
    check_curve(other, curve, TF32)
    ((curve, other),) = run_ranks(1, disturbed, 2e-3)
    with pytest.raises(AssertionError, match="at worst"):
        check_curve(other, curve, TF32)


@pytest.mark.parametrize("data", [{"seq_length": 128}, PACKED], ids=["whole rows", "packed documents"])
def test_bf16_stays_within_its_band(data: dict[str, object]) -> None:
    """torch computes BF16 products on any CPU, if need be slowly."""
    (reference,) = run_ranks(1, train, conditioned_config("local", {"params_dtype": "fp32"}, data=data), NUM_STEPS)
    (curve,) = run_ranks(1, train, conditioned_config("local", {"params_dtype": "bf16"}, data=data), NUM_STEPS)
    check_curve(curve, reference, BF16)


def compare_gradients(data: dict[str, object]) -> str:
    """Entry point of a rank."""
    from megatron_7b.parallel.groups import leaving_process_groups

    gradients = []
    for dtype in ("fp32", "bf16"):
        with leaving_process_groups():
            config = conditioned_config("local", {"params_dtype": dtype}, data=data, optimizer=UNCLIPPED)
            gradients.append(first_gradients(build(config)))
    return check_gradients(gradients[1], gradients[0], BF16)


@pytest.mark.parametrize("data", [{"seq_length": 128}, PACKED], ids=["whole rows", "packed documents"])
def test_every_gradient_in_bf16_is_near_the_one_in_fp32(data: dict[str, object]) -> None:
    (line,) = run_ranks(1, compare_gradients, data)
    assert line.startswith("bf16: gradient of ")
