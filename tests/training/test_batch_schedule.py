"""The global batch as a function of the consumed samples."""

from hypothesis import given
from hypothesis import strategies as st

from megatron_7b.config.schema import TrainingConfig
from megatron_7b.training.batch_schedule import consumed_samples_after, global_batch_size


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
