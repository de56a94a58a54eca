"""Sets that run out: exactly at their bound, their share then given to the others, at any place of the stream."""

import heapq

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_7b.config.schema import DataConfig
from megatron_7b.data import BatchLoader, Dataset, open_split
from megatron_7b.data._index import Blend, CappedBlend
from megatron_7b.errors import ConfigError
from tests.data.corpora import write_corpus

some_sets = st.lists(st.tuples(st.integers(1, 50), st.none() | st.integers(1, 200)), min_size=1, max_size=7)


def reference(sets: list[tuple[int, int | None]], count: int) -> list[tuple[int, int]]:
    """(set, sample) one by one: earliest deadline first among the sets that are left, anew whenever one runs out."""
    taken, order = [0] * len(sets), []
    while len(order) < count:
        left = [k for k, (_, limit) in enumerate(sets) if limit is None or taken[k] < limit]
        if not left:
            return order
        total, since, slot = sum(sets[k][0] for k in left), dict.fromkeys(left, 0), 0
        waiting, ready = [(0, k) for k in left], []
        while len(order) < count:
            while waiting and waiting[0][0] <= slot:
                _, k = heapq.heappop(waiting)
                heapq.heappush(ready, (-(-(since[k] + 1) * total // sets[k][0]), k))
            _, k = heapq.heappop(ready)
            order.append((k, taken[k]))
            taken[k] += 1
            since[k] += 1
            slot += 1
            heapq.heappush(waiting, (max(slot, since[k] * total // sets[k][0]), k))
            if taken[k] == sets[k][1]:
                break
    return order


def pairs(blend: CappedBlend, begin: int, count: int) -> list[tuple[int, int]]:
    """`picks` as a list."""
    sets, samples = blend.picks(begin, count)
    return list(zip(sets.tolist(), samples.tolist(), strict=True))


@given(sets=some_sets)
def test_it_is_the_heap_begun_anew_whenever_a_set_runs_out(sets: list[tuple[int, int | None]]) -> None:
    blend = CappedBlend([weight for weight, _ in sets], [limit for _, limit in sets])
    expected = reference(sets, 1500)
    limits = [limit for _, limit in sets]
    assert blend.num_samples == (None if None in limits else sum(limit or 0 for limit in limits))
    assert pairs(blend, 0, len(expected)) == expected
    if blend.num_samples is not None:
        assert blend.counts(blend.num_samples).tolist() == limits
        with pytest.raises(IndexError):
            blend.picks(blend.num_samples, 1)


@settings(max_examples=40)
@given(sets=some_sets, data=st.data())
def test_any_number_can_be_asked_for_alone(sets: list[tuple[int, int | None]], data: st.DataObject) -> None:
    weights, limits = [weight for weight, _ in sets], [limit for _, limit in sets]
    expected = reference(sets, 1500)
    number = data.draw(st.integers(0, len(expected) - 1))
    fresh = CappedBlend(weights, limits)
    assert pairs(fresh, number, 1) == [expected[number]]
    assert CappedBlend(weights, limits).number_of(*expected[number]) == number
    taken = [sum(k == which for which, _ in expected[:number]) for k in range(len(sets))]
    assert CappedBlend(weights, limits).counts(number).tolist() == taken


@settings(max_examples=25)
@given(weights=st.lists(st.integers(1, 50), min_size=2, max_size=5), data=st.data())
def test_shares_hold_within_a_sample_between_two_ends(weights: list[int], data: st.DataObject) -> None:
    """Billions of samples away, on both sides of the place where a set ends."""
    limits: list[int | None] = [data.draw(st.integers(10**9, 10**10)) for _ in weights[1:]]
    blend = CappedBlend(weights, [*limits, None])
    ends = sorted(blend.number_of(k, limit - 1) + 1 for k, limit in enumerate(limits) if limit is not None)
    for begin, end in zip([0, *ends], [*ends, ends[-1] + 1000], strict=True):
        before = blend.counts(begin)
        left = [k for k, limit in enumerate([*limits, None]) if limit is None or before[k] < limit]
        total = sum(weights[k] for k in left)
        for n in (begin + 1, (begin + end) // 2, end - 1, end):
            if begin <= n <= end:
                taken = blend.counts(n) - before
                assert all(abs(int(taken[k]) * total - weights[k] * (n - begin)) < total for k in left)
                assert taken.sum() == n - begin


def test_without_bounds_it_is_the_blend() -> None:
    weights = [5, 3, 1]
    for begin in (0, 10**12):
        expected = Blend(weights).picks(begin, 500)
        np.testing.assert_array_equal(CappedBlend(weights, [None] * 3).picks(begin, 500), expected)


def test_many_bounded_sets_are_found_quickly() -> None:
    rng = np.random.default_rng(0)
    weights, limits = rng.integers(1, 1000, 60).tolist(), rng.integers(10**6, 10**9, 60).tolist()
    blend = CappedBlend(weights, limits)
    assert blend.num_samples == sum(limits)
    ((last, sample),) = pairs(blend, sum(limits) - 1, 1)
    assert sample == limits[last] - 1


def test_impossible_limits_are_refused() -> None:
    for weights, limits in (([], []), ([1, 2], [3]), ([1], [-1])):
        with pytest.raises(ValueError, match="limit"):
            CappedBlend(weights, limits)
    blend = CappedBlend([1, 1], [3, None])
    for number in ((0, 3), (2, 0), (-1, 0), (1, -1)):
        with pytest.raises(IndexError):
            blend.number_of(*number)


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three corpora of 300, 100 and 70 tokens, in which every id occurs once."""
    folder = tmp_path_factory.mktemp("corpora")
    starts = ((0, 300), (1000, 100), (2000, 70))
    return [
        write_corpus(folder / f"{n}", [list(range(i, i + 10)) for i in range(first, first + size, 10)])
        for n, (first, size) in enumerate(starts)
    ]


def open_capped(prefixes: list[str], *max_epochs: float) -> Dataset:
    """The blend 1 : 2 : 3 of the three corpora in samples of 16 tokens."""
    train = ("1", prefixes[0], "2", prefixes[1], "3", prefixes[2])
    return open_split(DataConfig(train=train, split="1", seq_length=16, max_epochs=max_epochs), "train", seed=3)


def test_every_token_as_often_as_the_bound_says(prefixes: list[str]) -> None:
    dataset = open_capped(prefixes, 1, 2, 3)
    assert dataset.end == 19 + 13 + 14  # 300 / 16, 200 / 16 and 210 / 16, rounded up
    tokens = dataset.batch(range(dataset.end)).tokens.ravel()
    for first, size, epochs in ((0, 300, 1), (1000, 100, 2), (2000, 70, 3)):
        counts = np.bincount(tokens[(tokens >= first) & (tokens < first + size)] - first, minlength=size)
        assert counts.min() == epochs
        # The last sample goes on into the next epoch.
        assert (counts - epochs).sum() == -size * epochs % 16
    with pytest.raises(IndexError):
        dataset.batch([dataset.end])


def test_an_unbounded_set_takes_over(prefixes: list[str]) -> None:
    dataset = open_capped(prefixes, 0, 2, 0.5)
    assert dataset.end is None
    sets, samples = dataset.locate(range(2000))
    assert np.bincount(sets).tolist() == [2000 - 13 - 3, 13, 3]
    assert samples[sets == 1].tolist() == list(range(13))
    assert set(sets[100:]) == {0}


def test_one_number_bounds_all_sets(prefixes: list[str]) -> None:
    assert open_capped(prefixes, 2).end == 38 + 13 + 9
    assert open_capped(prefixes).end is None
    alone = open_split(DataConfig(train=(prefixes[1],), split="1", seq_length=16, max_epochs=(2,)), "train", seed=3)
    assert alone.end == 13
    assert len(np.unique(alone.batch(range(13)).tokens)) == 100


def test_validation_is_not_bounded(prefixes: list[str]) -> None:
    config = DataConfig(train=(prefixes[0],), split="50,50", seq_length=16, max_epochs=(1,))
    assert open_split(config, "valid", seed=1).end is None


def test_resume_is_exact_at_any_place_and_data_parallel_size(prefixes: list[str]) -> None:
    whole = open_capped(prefixes, 1, 2, 3)
    assert whole.end is not None
    expected = whole.batch(range(36)).tokens
    for begin in (0, 12, 24):
        for dp in (1, 2, 3):
            read = []
            for rank in range(dp):
                fresh = open_capped(prefixes, 1, 2, 3)
                with BatchLoader(
                    fresh, micro_batch_size=2, data_parallel_rank=rank, data_parallel_size=dp, num_workers=1
                ) as loader:
                    # The last step's successor lies behind the end: it is asked for ahead, and must not disturb.
                    read.append([loader.batches(start, 12) for start in range(begin, 36, 12)])
            steps = [
                np.concatenate([batch.tokens for ranks in zip(*step, strict=True) for batch in ranks])
                for step in zip(*read, strict=True)
            ]
            np.testing.assert_array_equal(np.concatenate(steps), expected[begin:])


def test_a_run_that_is_longer_than_its_data_is_refused(prefixes: list[str]) -> None:
    dataset = open_capped(prefixes, 1, 2, 3)
    dataset.check_end(46)
    with pytest.raises(ConfigError, match=r"47 samples of 16 tokens.*run out after 46"):
        dataset.check_end(47)
    open_capped(prefixes, 0, 2, 3).check_end(10**12)


def test_as_many_bounds_as_sets(prefixes: list[str]) -> None:
    for bounds in ((1, 2), (1, 2, 3, 4), (1, -1, 2)):
        with pytest.raises(ConfigError, match="one for each"):
            open_capped(prefixes, *bounds)
