"""Blends: how they are written, and that every prefix of the stream holds the shares to less than one sample."""

import heapq
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from megatron_7b.data import parse_blend
from megatron_7b.data._index import Blend
from megatron_7b.data.samples.blend import integer_weights
from megatron_7b.errors import ConfigError

weight_lists = st.lists(st.integers(1, 1000), min_size=1, max_size=12)


def check_prefixes(weights: list[int], sets: NDArray[np.int64], samples: NDArray[np.int64], begin: int) -> None:
    """Each set's count is within one of its share at every prefix; its samples come in their order, none missing."""
    total = sum(weights)
    numbers = np.arange(begin + 1, begin + len(sets) + 1)
    for k, weight in enumerate(weights):
        taken = np.cumsum(sets == k)
        before = samples[sets == k][0] if taken[-1] else -(-weight * begin // total)
        np.testing.assert_array_equal(samples[sets == k], before + np.arange(taken[-1]))
        assert (np.abs((before + taken) * total - weight * numbers) < total).all()


def reference_sets(weights: list[int], count: int) -> list[int]:
    """Earliest deadline first, from the beginning, with a heap."""
    total = sum(weights)
    taken = [0] * len(weights)
    released: list[tuple[int, int]] = []
    waiting = [(0, k) for k in range(len(weights))]
    heapq.heapify(waiting)
    order = []
    for slot in range(count):
        while waiting and waiting[0][0] <= slot:
            _, k = heapq.heappop(waiting)
            heapq.heappush(released, (-(-(taken[k] + 1) * total // weights[k]), k))
        _, k = heapq.heappop(released)
        order.append(k)
        taken[k] += 1
        heapq.heappush(waiting, (max(slot + 1, taken[k] * total // weights[k]), k))
    return order


@settings(max_examples=40)
@given(weights=weight_lists, block=st.integers(0, 2**30))
def test_within_one_sample_at_every_prefix(weights: list[int], block: int) -> None:
    """From a block's border far down the stream on, across the next border."""
    blend = Blend(weights)
    begin = block * blend.block_size + blend.block_size - 300
    sets, samples = blend.picks(begin, 600)
    check_prefixes(weights, sets, samples, begin)
    taken = blend.counts(begin + 600) - blend.counts(begin)
    assert taken.tolist() == np.bincount(sets, minlength=len(weights)).tolist()


@given(weights=weight_lists)
def test_starts_as_the_heap_does(weights: list[int]) -> None:
    assert Blend(weights).picks(0, 500)[0].tolist() == reference_sets(weights, 500)


@pytest.mark.parametrize("num_sets", [2, 37, 5000])
def test_many_sets_of_uneven_weights(num_sets: int) -> None:
    """Weights over two orders of magnitude; three blocks in a row, so two borders between them."""
    rng = np.random.default_rng(num_sets)
    weights = np.exp(rng.uniform(0, 5, num_sets) * np.log(10) / 2.5).round().astype(int).tolist()
    blend = Blend(weights)
    count = 2 * blend.block_size + 1000
    sets, samples = blend.picks(0, count)
    total, shares = sum(weights), np.array(weights)
    counts = np.zeros(num_sets, dtype=np.int64)
    for n, (k, sample) in enumerate(zip(sets.tolist(), samples.tolist(), strict=True), start=1):
        assert sample == counts[k]
        counts[k] += 1
        # The set that was just taken is the only one whose surplus grew; deficits are looked at now and then.
        assert counts[k] * total - shares[k] * n < total
        if n % 499 == 0 or abs(n % blend.block_size) < 2:
            assert (np.abs(counts * total - shares * n) < total).all()
            np.testing.assert_array_equal(counts, blend.counts(n))


@given(weights=weight_lists, begin=st.integers(0, 10**12), count=st.integers(1, 50))
def test_any_number_can_be_asked_for_alone(weights: list[int], begin: int, count: int) -> None:
    sets, samples = Blend(weights).picks(begin, count)
    fresh = Blend(weights)
    last = begin + count - 1
    assert [array[0] for array in fresh.picks(last, 1)] == [sets[-1], samples[-1]]
    assert [array[0] for array in fresh.picks(begin, 1)] == [sets[0], samples[0]]


def test_impossible_weights_are_refused() -> None:
    for weights in ([], [0, 1], [-1, 2], [2**40, 1], [1, 2**30]):
        with pytest.raises(ValueError, match=r"weight|set|share"):
            Blend(weights)


def test_parsing() -> None:
    assert [part.prefix for part in parse_blend(["my corpora/a"])] == ["my corpora/a"]
    parts = parse_blend(["0.7", "a", "0.3", "b"])
    assert [(part.weight, part.prefix) for part in parts] == [(Fraction(7, 10), "a"), (Fraction(3, 10), "b")]


@pytest.mark.parametrize(
    "entries",
    [[], [""], ["0.7", "a", "0.3"], ["0.7", "a", "b"], ["0", "a"], ["-1", "a"], ["a", "1"], ["a", "b"], ["nan", "a"]],
)
def test_malformed_blends_are_refused(entries: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"data\.train"):
        parse_blend(entries)


@given(st.lists(st.fractions(min_value=Fraction(1, 1000), max_value=1000), min_size=1, max_size=20))
def test_integer_weights_keep_the_shares(weights: list[Fraction]) -> None:
    whole = integer_weights(weights)
    assert sum(whole) <= 2**40
    for weight, integer in zip(weights, whole, strict=True):
        assert abs(Fraction(integer, sum(whole)) - weight / sum(weights)) < Fraction(len(weights) + 1, 2**39)
    Blend(whole)


def test_integer_weights_are_exact_where_they_can_be() -> None:
    assert integer_weights([Fraction("0.7"), Fraction("0.3")]) == [7, 3]
    assert integer_weights([Fraction("0.25"), Fraction("0.5"), Fraction("0.25")]) == [1, 2, 1]
    with pytest.raises(ConfigError, match="less than one sample"):
        integer_weights([Fraction(1), Fraction(1, 10**8)])
