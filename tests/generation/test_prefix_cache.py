"""Beginnings of earlier texts that are not read again: the same texts, on all ranks, within the limit."""

from collections.abc import Sequence

import numpy as np
import pytest

from megatron_7b.config.schema import RunConfig
from megatron_7b.errors import ConfigError
from megatron_7b.generation import decoder_runner
from megatron_7b.generation.engine import GenerationEngine
from megatron_7b.generation.options import BeamOptions
from megatron_7b.generation.prefixes import BLOCK
from megatron_7b.generation.requests import GeneratedToken, GenerationRequest
from tests.generation.test_engine import GREEDY, LAYOUTS, MODEL, build
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import VOCAB_SIZE, tiny_config

RANDOM = np.random.default_rng(5)


def some(length: int) -> tuple[int, ...]:
    return tuple(map(int, RANDOM.integers(0, VOCAB_SIZE, size=length)))


SYSTEM, OTHER = some(2 * BLOCK + 5), some(BLOCK + 1)
QUESTIONS = [some(length) for length in (3, 20, 40)]
NUM_NEW = 40

type Found = list[tuple[tuple[int, ...], int]]
"""Tokens of texts, and how many of their prompts were known."""


def request(prompt: tuple[int, ...], *, num_beams: int = 1) -> GenerationRequest:
    decoding = GREEDY if num_beams == 1 else BeamOptions(num_beams=num_beams)
    return GenerationRequest(prompt_ids=prompt, max_new_tokens=NUM_NEW, decoding=decoding)


def written(engine: GenerationEngine, prompts: Sequence[tuple[int, ...]]) -> Found:
    texts: list[list[int]] = [[] for _ in prompts]
    reused = [0] * len(prompts)
    for event in engine.generate([request(prompt) for prompt in prompts]):
        assert isinstance(event, GeneratedToken)
        texts[event.request].append(event.token_id)
        reused[event.request] = event.num_reused
    return list(zip(map(tuple, texts), reused, strict=True))


def conversations(config: RunConfig, num_tokens: int | None) -> tuple[list[Found], list[int]]:
    """Entry point of a rank: questions after one system prompt, next turns, a search; and the tokens that were held."""
    found: list[Found] = []
    held = []
    with GenerationEngine(build(config), max_batch_size=4) as engine:
        cache = engine._runner._cache
        widths = [block.shape[1] * block.shape[3] * 4 for block in (*cache._keys, *cache._values)]
        limit = (num_tokens or 10**6) * (sum(widths) + max(widths))
        engine.limit_cache(limit, prefix_cache=num_tokens is not None)

        def tell(*prompts: tuple[int, ...]) -> Found:
            found.append(written(engine, prompts))
            held.append(engine.num_cached_tokens + engine.num_prefix_tokens)
            return found[-1]

        first = tell(SYSTEM + QUESTIONS[0])
        turns = [SYSTEM + QUESTIONS[0] + first[0][0] + QUESTIONS[1]]
        tell(*turns, SYSTEM + QUESTIONS[2], OTHER)  # of different lengths to be read, from different positions on
        tell(SYSTEM + QUESTIONS[2], SYSTEM, SYSTEM[: 2 * BLOCK], some(0) + OTHER[:5])
        tell(*turns, *turns)
        search = request(SYSTEM, num_beams=3)
        (event,) = engine.generate([search])
        found.append([(one.token_ids, 0) for one in event.hypotheses])  # type: ignore[union-attr]
        number = engine.submit(request(OTHER + QUESTIONS[2]))  # left before its end, and kept all the same
        engine.step()
        engine.step()
        engine.cancel(number)
        tell(OTHER + QUESTIONS[2])
    return found, held


def texts_of(found: Sequence[Found]) -> list[list[tuple[int, ...]]]:
    return [[ids for ids, _ in some_texts] for some_texts in found]


@pytest.mark.parametrize("name", ["TP1", "TP2xPP2"])
def test_texts_are_the_same_and_beginnings_are_read_once(name: str) -> None:
    world_size, parallel = LAYOUTS[name]
    config = tiny_config(model={**MODEL, "max_position_embeddings": 256}, parallel=parallel)
    (plain, _), *_ = run_ranks(1, conversations, tiny_config(model={**MODEL, "max_position_embeddings": 256}), None)
    answers = run_ranks(world_size, conversations, config, 4000)
    assert all(answer == answers[0] for answer in answers), "on all ranks"
    found, _ = answers[0]
    assert texts_of(found) == texts_of(plain)
    reused = [[count for _, count in some_texts] for some_texts in found]
    # The system prompt; then with a question, its reply, and as far as blocks reach; never a whole prompt.
    asked = len(SYSTEM + QUESTIONS[0]) + NUM_NEW - 1
    assert reused[0] == [0]
    assert reused[1] == [asked // BLOCK * BLOCK, 2 * BLOCK, 0]
    assert reused[2] == [3 * BLOCK, 2 * BLOCK, BLOCK, 0]
    assert reused[3] == [(asked + len(QUESTIONS[1])) // BLOCK * BLOCK] * 2
    assert reused[5] == [2 * BLOCK]


def test_the_oldest_beginnings_give_way_to_texts() -> None:
    config = tiny_config(model={**MODEL, "max_position_embeddings": 256})
    ((plain, _),) = run_ranks(1, conversations, config, None)
    num_tokens = 700
    ((found, held),) = run_ranks(1, conversations, config, num_tokens)
    assert texts_of(found) == texts_of(plain)
    assert max(held) <= num_tokens
    assert held[1] > num_tokens - BLOCK - 160, "what is free is used"
    assert any(count for some_texts in found for _, count in some_texts)


def refusals(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match="prefix_cache needs max_cache_bytes"):
        GenerationEngine(build(config), prefix_cache=True)


def test_a_cache_without_end_is_refused() -> None:
    run_ranks(1, refusals, tiny_config(model=MODEL))


def at_random(config: RunConfig, seeds: Sequence[int]) -> int:
    """Entry point of a rank: texts that come and go at any time, whose prompts share beginnings, within random limits.

    Returns:
        How many tokens of prompts were known.
    """
    decoder_runner.TOKENS_AHEAD = 4  # in this process: caches grow while their texts are written
    chance = np.random.default_rng(0)
    trunks = [some(int(length)) for length in chance.integers(BLOCK - 3, 3 * BLOCK, size=3)]
    prompts = [
        trunk[: int(chance.integers(1, len(trunk) + 1))] + some(int(chance.integers(0, 20))) for trunk in 6 * trunks
    ]
    model = build(config)
    with GenerationEngine(model) as plain:
        whole = [ids for ids, _ in written(plain, prompts)]
    num_reused = 0
    for seed in seeds:
        chance = np.random.default_rng(seed)
        with GenerationEngine(model, max_batch_size=int(chance.integers(3, 9))) as engine:
            cache = engine._runner._cache
            widths = [block.shape[1] * block.shape[3] * 4 for block in (*cache._keys, *cache._values)]
            engine.limit_cache(int(chance.integers(150, 2000)) * (sum(widths) + max(widths)), prefix_cache=True)
            running: dict[int, tuple[int, int, list[int]]] = {}
            left = 40
            while left or running:
                for _ in range(int(chance.integers(0, 4)) if left else 0):
                    left -= 1 if left else 0
                    which, num_new = int(chance.integers(0, len(prompts))), int(chance.integers(1, NUM_NEW + 1))
                    asked = GenerationRequest(prompt_ids=prompts[which], max_new_tokens=num_new, decoding=GREEDY)
                    running[engine.submit(asked)] = which, num_new, []
                for event in engine.step():
                    assert isinstance(event, GeneratedToken)
                    which, num_new, ids = running[event.request]
                    ids.append(event.token_id)
                    assert ids[-1] == whole[which][len(ids) - 1], (seed, which, len(ids), event.num_reused)
                    num_reused += event.num_reused if len(ids) == 1 else 0
                    if event.is_last:
                        assert len(ids) == num_new
                        del running[event.request]
                if running and chance.random() < 0.1:
                    number = int(chance.choice(list(running)))
                    engine.cancel(number)
                    del running[number]
                held = engine.num_cached_tokens + engine.num_prefix_tokens
                assert held <= engine.max_cache_tokens, (seed, held, engine.num_prefix_tokens, engine.max_cache_tokens)
    return num_reused


def test_texts_that_come_and_go_at_random() -> None:
    (num_reused,) = run_ranks(1, at_random, tiny_config(model={**MODEL, "max_position_embeddings": 256}), range(6))
    assert num_reused > 1000
