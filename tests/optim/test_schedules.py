"""The learning rate as a function of the step."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_7b.config.optimizer_config import OptimizerConfig
from megatron_7b.optim.schedules import learning_rate

STYLES = ("cosine", "linear", "wsd", "constant")


@st.composite
def schedules(draw: st.DrawFn) -> tuple[OptimizerConfig, int]:
    """Any schedule whose warm-up ends before its decay does, and a length of run."""
    train_steps = draw(st.integers(2, 400))
    decay_steps = draw(st.none() | st.integers(2, 500))
    end = decay_steps or train_steps
    lr = draw(st.floats(1e-6, 1.0))
    config = OptimizerConfig(
        lr=lr,
        min_lr=lr * draw(st.floats(0.0, 1.0)),
        lr_decay_style=draw(st.sampled_from(STYLES)),
        lr_warmup_steps=draw(st.integers(0, end - 1)),
        lr_decay_steps=decay_steps,
        lr_wsd_decay_steps=draw(st.none() | st.integers(1, end)),
    )
    return config, train_steps


@given(schedules())
def test_warms_up_then_never_rises_and_stays_between_the_bounds(schedule: tuple[OptimizerConfig, int]) -> None:
    config, train_steps = schedule
    end = max(train_steps, config.lr_decay_steps or 0)
    rates = [learning_rate(step, config, train_steps) for step in range(1, end + 10)]
    warm_up, rest = rates[: config.lr_warmup_steps], rates[config.lr_warmup_steps :]
    assert warm_up == pytest.approx([config.lr * k / config.lr_warmup_steps for k in range(1, len(warm_up) + 1)])
    assert all(0 < rate <= config.lr for rate in warm_up)
    slack = 1e-12 * config.lr
    assert all(config.min_lr - slack <= rate <= config.lr + slack for rate in rest)
    assert all(later <= earlier + slack for earlier, later in itertools.pairwise(rest))


@given(schedules())
def test_ends_at_its_floor_exactly(schedule: tuple[OptimizerConfig, int]) -> None:
    config, train_steps = schedule
    end = config.lr_decay_steps if config.lr_decay_steps is not None else train_steps
    floor = config.lr if config.lr_decay_style == "constant" else config.min_lr
    assert learning_rate(end, config, train_steps) == floor
    assert learning_rate(end + 7, config, train_steps) == floor


@given(schedules(), st.integers(1, 300))
def test_a_rate_depends_on_nothing_but_its_arguments(schedule: tuple[OptimizerConfig, int], step: int) -> None:
    """What makes a resumed run continue on the same curve: no call changes a later one."""
    config, train_steps = schedule
    alone = learning_rate(step, config, train_steps)
    for other in range(1, 50):
        learning_rate(other, config, train_steps)
    assert learning_rate(step, config, train_steps) == alone


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("constant", [5.0, 10.0, 10.0, 10.0, 10.0, 10.0]),
        ("linear", [5.0, 10.0, 8.0, 6.0, 4.0, 2.0]),
        ("cosine", [5.0, 10.0, 6 + 4 * math.cos(math.pi / 4), 6.0, 6 + 4 * math.cos(3 * math.pi / 4), 2.0]),
        ("wsd", [5.0, 10.0, 10.0, 10.0, 10 - 8 * math.sqrt(0.5), 2.0]),
    ],
)
def test_six_steps_worked_out_by_hand(style: str, expected: list[float]) -> None:
    config = OptimizerConfig(lr=10.0, min_lr=2.0, lr_warmup_steps=2, lr_wsd_decay_steps=2, lr_decay_style=style)  # type: ignore[arg-type]
    assert [learning_rate(step, config, 6) for step in range(1, 7)] == pytest.approx(expected)


@pytest.mark.parametrize(("decay_steps", "expected"), [(None, 3), (50, 5)])
def test_the_warm_up_may_be_a_share_of_the_steps_until_the_decay_ends(decay_steps: int | None, expected: int) -> None:
    shared = OptimizerConfig(lr_warmup_steps=7, lr_warmup_fraction=0.1, lr_decay_steps=decay_steps)
    counted = OptimizerConfig(lr_warmup_steps=expected, lr_decay_steps=decay_steps)
    for step in range(1, 31):
        assert learning_rate(step, shared, 30) == learning_rate(step, counted, 30)


def test_wsd_decays_over_the_last_tenth_unless_told_otherwise() -> None:
    config = OptimizerConfig(lr=1.0, min_lr=0.0, lr_decay_style="wsd")
    rates = [learning_rate(step, config, 100) for step in range(1, 101)]
    assert rates[:90] == [1.0] * 90
    assert 0 < rates[90] < 1
    assert rates[99] == 0.0


def test_cosine_agrees_with_torch() -> None:
    """torch's scheduler counts from 0, which is our step 0: one before the first update."""
    torch = pytest.importorskip("torch")
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=3e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=3e-5)
    config = OptimizerConfig(lr=3e-4, min_lr=3e-5, lr_decay_style="cosine")
    for step in range(1, 51):
        optimizer.step()
        scheduler.step()
        assert learning_rate(step, config, 50) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9)


@pytest.mark.parametrize("step", [0, -1])
def test_there_is_no_step_before_the_first(step: int) -> None:
    with pytest.raises(ValueError, match="counted from 1"):
        learning_rate(step, OptimizerConfig(), 10)
