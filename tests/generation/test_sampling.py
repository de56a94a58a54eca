"""Sampling: which tokens stay, and with which probability each is drawn."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_7b.errors import ConfigError
from megatron_7b.generation.sampling import (
    SamplingOptions,
    TokenSampler,
    draw,
    penalize,
    token_probabilities,
    top_k_tokens,
    top_p_tokens,
)

# Few distinct values, so that ties are common.
LOGITS = st.lists(st.integers(-6, 6), min_size=1, max_size=12).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)


# Logits far apart and near, and of tokens that are impossible.
SPREAD = st.lists(
    st.sampled_from([0.0, -0.5, -3.9, -4.0, -4.1, -9.0, -20.0, -50.0, -math.inf]), min_size=1, max_size=30
)


def dense(logits: torch.Tensor, options: SamplingOptions) -> torch.Tensor:
    """Probabilities of all tokens."""
    tokens, probabilities = token_probabilities(logits, options)
    assert tokens.tolist() == sorted(set(tokens.tolist()))
    return torch.zeros(len(logits), dtype=torch.float64).index_put((tokens,), probabilities)


def ranked(logits: torch.Tensor) -> list[int]:
    """Token ids by descending logit, lower ids first among equals."""
    return sorted(range(len(logits)), key=lambda i: (-float(logits[i]), i))


def after_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """All but the k largest are impossible."""
    dropped = torch.tensor(ranked(logits)[k:], dtype=torch.int64)
    return logits.index_fill(0, dropped, -math.inf)


@given(LOGITS, st.integers(1, 14))
def test_top_k_keeps_exactly_the_k_largest(logits: torch.Tensor, k: int) -> None:
    assert top_k_tokens(logits - logits.max(), k).tolist() == ranked(logits)[:k]


@given(SPREAD, st.integers(1, 40))
def test_top_k_looks_as_far_as_it_must(values: list[float], k: int) -> None:
    logits = torch.tensor([0.0, *values], dtype=torch.float64)
    assert top_k_tokens(logits, k).tolist() == ranked(logits)[:k]


@given(LOGITS | SPREAD.map(lambda values: torch.tensor([0.0, *values]).double()), st.floats(0.01, 1.0))
def test_top_p_keeps_the_smallest_sufficient_set(logits: torch.Tensor, p: float) -> None:
    tokens = top_p_tokens(logits - logits.max(), p).tolist()
    weights = [math.exp(value) for value in logits.tolist()]
    shares = [weights[i] / math.fsum(weights) for i in ranked(logits)]
    size = len(tokens)
    assert tokens == ranked(logits)[:size]
    # Enough, and one less would not be; sums that rounding cannot tell from p may go either way.
    assert math.fsum(shares[:size]) >= p - 1e-12
    assert size == 1 or math.fsum(shares[: size - 1]) < p + 1e-12


@given(LOGITS, st.floats(0.1, 5.0), st.integers(1, 14), st.floats(0.01, 1.0))
def test_filters_apply_in_order_and_leave_a_distribution(
    logits: torch.Tensor, temperature: float, k: int, p: float
) -> None:
    probabilities = dense(logits, SamplingOptions(temperature=temperature, top_k=k, top_p=p))
    largest = after_top_k(logits / temperature, k)
    tokens = top_p_tokens(largest - largest.max(), p)
    expected = after_top_k(largest, len(tokens)).softmax(-1)
    torch.testing.assert_close(probabilities, expected)
    assert math.isclose(float(probabilities.sum()), 1.0, rel_tol=1e-12)


@given(LOGITS, st.sampled_from([1e-3, 1e-30, 1e-320]))
def test_temperature_towards_zero_is_greedy(logits: torch.Tensor, temperature: float) -> None:
    best = logits == logits.max()
    probabilities = dense(logits, SamplingOptions(temperature=temperature))
    torch.testing.assert_close(probabilities, best.double() / best.sum())
    cold = TokenSampler(SamplingOptions(temperature=temperature, top_k=1))
    assert cold.choose(logits) == TokenSampler(SamplingOptions(temperature=0.0)).choose(logits) == ranked(logits)[0]


def test_huge_logits_do_not_overflow() -> None:
    logits = torch.tensor([3e38, -3e38, torch.finfo(torch.float32).min])
    probabilities = dense(logits, SamplingOptions(temperature=1e-10))
    assert probabilities.tolist() == [1.0, 0.0, 0.0]


@given(
    st.lists(st.sampled_from([0.0, 0.0, 1e-300, 0.1, 1.0, 7.0]), min_size=1, max_size=10).filter(any),
    st.floats(0.0, 1.0, exclude_max=True),
)
def test_draw_inverts_the_cumulative_distribution(weights: list[float], uniform: float) -> None:
    probabilities = torch.tensor(weights, dtype=torch.float64)
    token = draw(probabilities, uniform)
    assert weights[token] > 0.0
    cumulative = [0.0, *probabilities.cumsum(-1).tolist()]
    assert cumulative[token] <= uniform * cumulative[-1] <= cumulative[token + 1]


def test_frequencies_are_the_probabilities() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -5.0])
    options = SamplingOptions(temperature=1.3, top_k=4, seed=5)
    sampler, num_draws = TokenSampler(options), 20_000
    counts = Counter(sampler.choose(logits) for _ in range(num_draws))
    expected = dense(logits, options).tolist()
    assert counts[4] == 0
    chi_squared = sum((counts[i] - num_draws * expected[i]) ** 2 / (num_draws * expected[i]) for i in range(4))
    assert chi_squared < 16.3  # 0.1 % of true samples exceed it at 3 degrees of freedom


def test_a_seed_gives_the_same_tokens_and_samples_differ() -> None:
    logits = torch.zeros(1000)

    def tokens(seed: int, sample_index: int) -> list[int]:
        sampler = TokenSampler(SamplingOptions(seed=seed), sample_index)
        return [sampler.choose(logits) for _ in range(20)]

    assert tokens(1, 0) == tokens(1, 0)
    assert len({tuple(tokens(seed, index)) for seed in range(4) for index in range(4)}) == 16


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5, "top_k": -1}, "top_k is -1, expected at least 1; top_p is 1.5"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SamplingOptions(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("penalty", [0.5, 2.0, 5.0])
@pytest.mark.parametrize("prompt", [(), (2, 0, 2)])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float, prompt: tuple[int, ...]) -> None:
    """Greedy tokens under logits that favour few of them: without the tokens so far, one would come again and again."""
    from transformers import RepetitionPenaltyLogitsProcessor

    sampler = TokenSampler(SamplingOptions(temperature=0.0, repetition_penalty=penalty), prompt_ids=prompt)
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    generator = torch.Generator().manual_seed(5)
    bias = torch.linspace(2, -2, 80)
    text, plain = list(prompt), []
    for _ in range(40):
        logits = bias + torch.randn(80, generator=generator)
        expected = (
            processor(torch.tensor([text], dtype=torch.int64), logits[None].clone()).argmax().item()
            if text
            else int(logits.argmax())
        )
        text.append(sampler.choose(logits))
        plain.append(int(logits.argmax()))
        assert text[-1] == expected
    assert text[len(prompt) :] != plain


def test_no_numbers_lead_beyond_the_vocabulary() -> None:
    """A token that is none would end all texts that are being written."""
    logits = torch.tensor([3.0, 2.0, -1.0])
    endless = penalize(logits, torch.tensor([0, 1]), 1e-300)
    assert dense(endless, SamplingOptions()).tolist() == [0.5, 0.5, 0.0]
    broken = torch.full((3,), torch.nan)
    for options in ({}, {"top_k": 2}, {"top_p": 0.5}, {"top_k": 2, "top_p": 0.5}):
        assert 0 <= TokenSampler(SamplingOptions(**options)).choose(broken) < 3
