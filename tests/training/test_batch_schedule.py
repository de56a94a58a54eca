"""The global batch as a function of the consumed samples."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_7b.config.schema import TrainingConfig
from megatron_7b.errors import ConfigError
from megatron_7b.training.batch_schedule import (
    check_rampup,
    consumed_samples_after,
    global_batch_size,
    num_microbatches,
)


@st.composite
def ramps(draw: st.DrawFn) -> TrainingConfig:
    start, increment, num_increments = draw(st.integers(1, 64)), draw(st.integers(1, 16)), draw(st.integers(0, 12))
    return TrainingConfig(
        global_batch_size=start + increment * num_increments,
        rampup_batch_size=(start, increment, draw(st.integers(0, 5000))),
    )


def test_without_a_ramp_the_batch_is_constant() -> None:
    config = TrainingConfig(global_batch_size=48)
    assert {global_batch_size(consumed, config) for consumed in (0, 1, 10**9)} == {48}


def test_a_ramp_worked_out_by_hand() -> None:
    """From 8 to 32 in three increments over 300 samples: one increment per 100 samples."""
    config = TrainingConfig(global_batch_size=32, rampup_batch_size=(8, 8, 300))
    sizes = {consumed: global_batch_size(consumed, config) for consumed in (0, 99, 100, 199, 200, 299, 300, 1000)}
    assert sizes == {0: 8, 99: 8, 100: 16, 199: 16, 200: 24, 299: 24, 300: 32, 1000: 32}


@given(ramps(), st.integers(0, 6000))
def test_a_ramp_starts_low_never_shrinks_and_arrives(config: TrainingConfig, consumed: int) -> None:
    assert config.rampup_batch_size is not None
    start, increment, ramp_samples = config.rampup_batch_size
    size = global_batch_size(consumed, config)
    assert start <= size <= config.global_batch_size
    assert (size - start) % increment == 0
    assert size <= global_batch_size(consumed + 1, config)
    assert global_batch_size(ramp_samples, config) == config.global_batch_size
    if ramp_samples > 0:
        assert global_batch_size(0, config) == start


@given(ramps(), st.integers(0, 200))
def test_samples_of_a_run_are_the_sum_of_its_steps(config: TrainingConfig, num_steps: int) -> None:
    consumed = 0
    for _ in range(num_steps):
        consumed += global_batch_size(consumed, config)
    assert consumed_samples_after(num_steps, config) == consumed


@given(ramps(), st.integers(1, 60), st.data())
def test_a_resumed_ramp_goes_on_where_it_was(config: TrainingConfig, num_steps: int, data: st.DataObject) -> None:
    """The consumed samples are all there is to resume from."""

    def sizes_from(consumed: int, steps: int) -> list[int]:
        sizes = []
        for _ in range(steps):
            sizes.append(global_batch_size(consumed, config))
            consumed += sizes[-1]
        return sizes

    cut = data.draw(st.integers(0, num_steps))
    resumed = sizes_from(consumed_samples_after(cut, config), num_steps - cut)
    assert sizes_from(0, cut) + resumed == sizes_from(0, num_steps)


@pytest.mark.parametrize("rampup", [(0, 8, 100), (8, 0, 100), (8, 8, -1), (40, 8, 100), (8, 7, 100)])
def test_a_ramp_that_misses_its_end_is_refused(rampup: tuple[int, int, int]) -> None:
    config = dataclasses.replace(TrainingConfig(global_batch_size=32), rampup_batch_size=rampup)
    with pytest.raises(ConfigError, match="rampup_batch_size"):
        check_rampup(config)


def test_microbatches_share_the_batch_exactly() -> None:
    assert num_microbatches(48, 4, 3) == 4
    with pytest.raises(ConfigError, match="a multiple of 12; the nearest are 36 and 48"):
        num_microbatches(40, 4, 3)
    with pytest.raises(ConfigError, match="the nearest are 12 and 12"):
        num_microbatches(7, 4, 3)
