"""Scores of continuations against forward passes without a cache, on one rank and on several."""

import numpy as np
import pytest
import torch

from megatron_7b.config.schema import RunConfig
from megatron_7b.errors import ConfigError
from megatron_7b.generation.engine import GenerationEngine
from megatron_7b.generation.score import Score, ScoreRequest
from tests.generation.test_engine import LAYOUTS, MODEL, build, full_logits
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import VOCAB_SIZE, tiny_config

RANDOM = np.random.default_rng(3)


def some(length: int) -> tuple[int, ...]:
    return tuple(map(int, RANDOM.integers(0, VOCAB_SIZE, size=length)))


SHOTS, QUESTIONS = some(12), [some(length) for length in (3, 1, 6, 6)]
REQUESTS = [
    *(ScoreRequest(SHOTS + question, some(length)) for question in QUESTIONS for length in (1, 1, 4, 2)),
    ScoreRequest((5,), some(9)),
    ScoreRequest(SHOTS + QUESTIONS[0], SHOTS[:1]),
    *(ScoreRequest(SHOTS[:length], SHOTS[length:]) for length in (4, 7)),  # one text, scored from two places on
]


def scores(config: RunConfig, batch_size: int, max_length: int | None = None) -> list[Score]:
    with GenerationEngine(build(config), max_batch_size=batch_size, max_length=max_length) as engine:
        list(engine.score(REQUESTS[:7]))  # what is left in the cache must not matter
        found = dict(engine.score(REQUESTS))
    return [found[number] for number in range(len(REQUESTS))]


@pytest.fixture(scope="module", params=[None, 10])
def expected(request: pytest.FixtureRequest) -> tuple[int | None, list[Score]]:
    """What a forward pass over each text gives, by itself; all of it, or its last ten tokens."""
    texts = [(*one.context_ids, *one.continuation_ids)[:-1][-(request.param or 99) :] for one in REQUESTS]
    (logits,) = run_ranks(1, full_logits, tiny_config(model=MODEL), texts)
    answers = []
    for one, of_text in zip(REQUESTS, logits, strict=True):
        wanted = torch.tensor(one.continuation_ids)
        predictions = torch.tensor(of_text[-len(wanted) :]).double()
        chosen = predictions.log_softmax(dim=1).gather(1, wanted[:, None]).sum()
        answers.append(Score(float(chosen), bool((predictions.argmax(dim=1) == wanted).all())))
    return request.param, answers


@pytest.mark.parametrize(("layout", "batch_size"), [("TP1", 1), ("TP1", 5), ("TP1", 64), ("TP2", 5), ("TP2xPP2", 5)])
def test_scores_are_those_of_full_forward_passes(
    expected: tuple[int | None, list[Score]], layout: str, batch_size: int
) -> None:
    max_length, answers = expected
    world_size, parallel = LAYOUTS[layout]
    found = run_ranks(world_size, scores, tiny_config(model=MODEL, parallel=parallel), batch_size, max_length)
    for of_rank in found:
        assert [one.is_greedy for one in of_rank] == [one.is_greedy for one in answers]
        np.testing.assert_allclose(
            [one.log_likelihood for one in of_rank], [one.log_likelihood for one in answers], rtol=1e-5
        )


def refusals(config: RunConfig) -> list[str]:
    said = []
    with GenerationEngine(build(config), max_length=4) as engine:
        for request in (ScoreRequest((1,), some(5)), ScoreRequest((VOCAB_SIZE,), (1,))):
            with pytest.raises(ConfigError) as error:
                list(engine.score([request]))
            said.append(str(error.value))
    return said


def test_what_cannot_be_scored_is_refused() -> None:
    (said,) = run_ranks(1, refusals, tiny_config(model=MODEL))
    assert "a continuation has 5 tokens, and the model's context is 4" in said[0]
    assert f"a text has token {VOCAB_SIZE}" in said[1]
    with pytest.raises(ConfigError, match="the context has no tokens"):
        ScoreRequest((), (1,))
