"""The engine against forward passes without a cache, on one rank and on several."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from megatron_7b.config.schema import RunConfig
from megatron_7b.errors import ConfigError
from megatron_7b.generation.cache import CachedAttention, KeyValueCache, attention_layers, place, visible_keys
from megatron_7b.generation.engine import GenerationEngine
from megatron_7b.generation.options import SamplingOptions
from megatron_7b.generation.requests import GenerationRequest
from megatron_7b.generation.score import ScoreRequest
from megatron_7b.model.builder import build_model
from megatron_7b.model.kinds.decoder.network import LanguageModel
from megatron_7b.parallel.groups import initialize_model_parallel, process_groups
from tests.support.ranks import RankFailedError, run_ranks
from tests.support.tiny_runs import VOCAB_SIZE, tiny_config

GREEDY = SamplingOptions(temperature=0.0)
LAYOUTS = {
    "TP1": (1, {}),
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "PP3, uneven": (3, {"pipeline_model_parallel_size": 3}),
    "TP2xPP2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
}
# Large enough initial weights that the logits tell positions and layers apart.
MODEL = {"init_method_std": 0.2, "qk_layernorm": True, "add_qkv_bias": True}
RANDOM = np.random.default_rng(7)
LONG = tuple(int(i) for i in RANDOM.integers(0, VOCAB_SIZE, size=50))
PROMPTS = [tuple(int(i) for i in RANDOM.integers(0, VOCAB_SIZE, size=length)) for length in (3, 17, 1, 8)]


def build(config: RunConfig) -> LanguageModel:
    layout = initialize_model_parallel(config.parallel, seed=config.training.seed)
    (model,) = build_model(config, vocab_size=VOCAB_SIZE, layout=layout, groups=process_groups(), device_type="cpu")
    assert isinstance(model, LanguageModel)
    return model.eval()


def full_logits(config: RunConfig, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Logits [s, v] of every row by the model's own forward pass, without cache or padding."""
    model = build(config)
    with torch.no_grad():
        return [
            model(torch.tensor([row]), torch.arange(len(row))[None], None)[0, :, :VOCAB_SIZE].numpy() for row in rows
        ]


def cached_logits(config: RunConfig, rows: Sequence[Sequence[int]], num_prefilled: Sequence[int]) -> np.ndarray | None:
    """Logits [steps, b, v] along given texts: a ragged prefill, then one token at a time."""
    model = build(config)
    with GenerationEngine(model) as engine, torch.inference_mode():
        longest = max(num_prefilled)
        runner = engine._runner
        runner._cache.reserve(len(rows), longest)  # grows while texts run
        prompts = [[*row[:length], *[0] * (longest - length)] for row, length in zip(rows, num_prefilled, strict=True)]
        lengths = list(num_prefilled)
        steps = [runner._logits_after(prompts, 0, [0] * len(rows), [length - 1 for length in lengths])]
        while all(length < len(row) for length, row in zip(lengths, rows, strict=True)):
            runner._cache.reserve(len(rows), max(lengths) + 1)
            tokens = [[row[length]] for row, length in zip(rows, lengths, strict=True)]
            steps.append(runner._logits_after(tokens, 0, lengths, [0] * len(rows)))
            lengths = [length + 1 for length in lengths]
        assert all(isinstance(a.core_attention, CachedAttention) for a in attention_layers(model.decoder.layers))
    assert not any(isinstance(a.core_attention, CachedAttention) for a in attention_layers(model.decoder.layers))
    return None if steps[0] is None else np.stack([logits.numpy() for logits in steps])


@pytest.mark.parametrize("name", LAYOUTS)
def test_cached_logits_are_those_of_a_full_forward(name: str) -> None:
    rows = [list(map(int, np.random.default_rng(row).integers(0, VOCAB_SIZE, size=24))) for row in range(3)]
    (expected,) = run_ranks(1, full_logits, tiny_config(model=MODEL), rows)
    world_size, parallel = LAYOUTS[name]
    num_prefilled = [1, 9, 4]
    results = run_ranks(world_size, cached_logits, tiny_config(model=MODEL, parallel=parallel), rows, num_prefilled)
    answers = [result for result in results if result is not None]
    assert len(answers) == parallel.get("tensor_model_parallel_size", 1)  # the last stage only, all its tensor ranks
    for steps in answers:
        assert len(steps) == 16
        for step, logits in enumerate(steps):
            for row, length in enumerate(num_prefilled):
                np.testing.assert_allclose(
                    logits[row, :VOCAB_SIZE], expected[row][length - 1 + step], rtol=2e-5, atol=2e-5
                )
            assert (logits[:, VOCAB_SIZE:] < -1e30).all()


def continue_texts(
    config: RunConfig,
    prompts: Sequence[tuple[int, ...]],
    options: SamplingOptions,
    max_batch_size: int = 32,
    new_tokens: Sequence[int] | None = None,
    stop_ids: Sequence[int] = (),
) -> list[list[int]]:
    """Tokens that the engine gives each prompt; `sample_index` counts equal prompts."""
    new_tokens = new_tokens or [12] * len(prompts)
    requests = [
        GenerationRequest(
            prompt_ids=prompt, max_new_tokens=count, decoding=options, sample_index=prompts[:index].count(prompt)
        )
        for index, (prompt, count) in enumerate(zip(prompts, new_tokens, strict=True))
    ]
    texts: list[list[int]] = [[] for _ in requests]
    with GenerationEngine(build(config), stop_ids=stop_ids, max_batch_size=max_batch_size) as engine:
        for token in engine.generate(requests):
            texts[token.request].append(token.token_id)
        assert engine.num_unfinished == 0
    return texts


def greedy_without_cache(config: RunConfig, prompts: Sequence[tuple[int, ...]], num_tokens: int) -> list[list[int]]:
    model = build(config)
    texts = [list(prompt) for prompt in prompts]
    with torch.no_grad():
        for text in texts:
            for _ in range(num_tokens):
                logits = model(torch.tensor([text]), torch.arange(len(text))[None], None)[0, -1, :VOCAB_SIZE]
                text.append(int(logits.argmax()))
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


@pytest.fixture(scope="module")
def greedy_texts() -> list[list[int]]:
    (texts,) = run_ranks(1, greedy_without_cache, tiny_config(model=MODEL), PROMPTS, 12)
    assert len({tuple(text) for text in texts}) == len(texts)
    return texts


@pytest.mark.parametrize("name", LAYOUTS)
def test_prompts_of_different_lengths_do_not_disturb_each_other(name: str, greedy_texts: list[list[int]]) -> None:
    world_size, parallel = LAYOUTS[name]
    for texts in run_ranks(world_size, continue_texts, tiny_config(model=MODEL, parallel=parallel), PROMPTS, GREEDY):
        assert texts == greedy_texts


@pytest.mark.parametrize("max_batch_size", [1, 2, 3])
def test_waiting_texts_take_the_places_of_finished_ones(max_batch_size: int, greedy_texts: list[list[int]]) -> None:
    counts = [12, 2, 7, 5]
    (texts,) = run_ranks(1, continue_texts, tiny_config(model=MODEL), PROMPTS, GREEDY, max_batch_size, counts)
    assert texts == [text[:count] for text, count in zip(greedy_texts, counts, strict=True)]


def test_a_text_ends_with_each_of_the_stop_tokens(greedy_texts: list[list[int]]) -> None:
    ends = {greedy_texts[1][4], greedy_texts[0][6]}
    (texts,) = run_ranks(1, continue_texts, tiny_config(model=MODEL), PROMPTS, GREEDY, 32, None, sorted(ends))
    for text, whole in zip(texts, greedy_texts, strict=True):
        first = next((index for index, token in enumerate(whole) if token in ends), len(whole))
        assert text == whole[: first + 1]


def test_samples_depend_on_seed_and_index_only() -> None:
    options = SamplingOptions(temperature=0.8, top_k=50, top_p=0.95, seed=3)
    config = tiny_config(model=MODEL)
    ((alone,),) = run_ranks(1, continue_texts, config, PROMPTS[:1], options)
    prompts = [PROMPTS[1], PROMPTS[0], PROMPTS[0], PROMPTS[0], PROMPTS[2]]
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    for texts in run_ranks(4, continue_texts, tiny_config(model=MODEL, parallel=layout), prompts, options):
        assert texts[1] == alone
        assert len({tuple(text) for text in texts[1:4]}) == 3
    ((other,),) = run_ranks(1, continue_texts, config, PROMPTS[:1], dataclasses.replace(options, seed=4))
    assert other != alone


def cancelled(config: RunConfig) -> tuple[list[list[int]], int]:
    """Drop the first of three texts after three steps."""
    with GenerationEngine(build(config)) as engine:
        numbers = [
            engine.submit(GenerationRequest(prompt_ids=prompt, max_new_tokens=12, decoding=GREEDY))
            for prompt in PROMPTS[:3]
        ]
        texts: list[list[int]] = [[] for _ in numbers]
        for step in range(20):
            if step == 3:
                engine.cancel(numbers[0])
            for token in engine.step():
                texts[numbers.index(token.request)].append(token.token_id)
        return texts, engine.num_unfinished


def test_a_cancelled_text_leaves_the_others_alone(greedy_texts: list[list[int]]) -> None:
    ((texts, unfinished),) = run_ranks(1, cancelled, tiny_config(model=MODEL))
    assert unfinished == 0
    assert texts == [greedy_texts[0][:3], greedy_texts[1], greedy_texts[2]]


def refusals(config: RunConfig) -> list[str]:
    messages = []
    with GenerationEngine(build(config), max_length=20) as engine:
        for prompt, count in (((VOCAB_SIZE,), 1), ((1, -1), 1), ((1,) * 10, 11), ((), 1), ((1,), 0)):
            with pytest.raises(ConfigError) as caught:
                engine.submit(GenerationRequest(prompt_ids=prompt, max_new_tokens=count))
            messages.append(str(caught.value))
    return messages


def test_impossible_requests_are_refused() -> None:
    (messages,) = run_ranks(1, refusals, tiny_config())
    expected = ["token 509", "token -1", "make 21", "no tokens", "max_new_tokens is 0"]
    for message, words in zip(messages, expected, strict=True):
        assert words in message


def test_a_model_with_sequence_parallelism_is_refused() -> None:
    parallel = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    with pytest.raises(RankFailedError, match="sequence parallelism"):
        run_ranks(2, continue_texts, tiny_config(parallel=parallel), PROMPTS, GREEDY)


def test_what_a_query_sees() -> None:
    cpu = torch.device("cpu")
    assert visible_keys(place(0, [0, 0], 5, cpu)) is None
    assert visible_keys(place(3, [7, 7], 1, cpu)) is None
    ragged = visible_keys(place(0, [2, 0], 2, cpu))
    assert ragged is not None
    assert ragged[0, 0].tolist() == [[True, True, True, False], [True, True, True, True]]
    assert ragged[1, 0].tolist() == [[True, False, False, False], [True, True, False, False]]
    continued = visible_keys(place(0, [3, 3], 2, cpu))  # a second prefill: a plain causal mask would be wrong
    assert continued is not None
    assert continued[0, 0].tolist() == [[True, True, True, True, False], [True] * 5]


def room_over_time(config: RunConfig) -> tuple[list[int], list[list[int]]]:
    """Entry point of a rank: tokens that the cache has room for, as short texts, a long one and short ones come."""
    texts: list[list[int]] = []
    room: list[int] = []
    greedy = SamplingOptions(temperature=0.0)
    with GenerationEngine(build(config)) as engine:
        cache = engine._runner._cache
        for count, new_tokens in ((8, 4), (1, 90), (8, 4), (2, 4)):
            requests = [
                GenerationRequest(prompt_ids=PROMPTS[0], max_new_tokens=new_tokens, decoding=greedy)
                for _ in range(count)
            ]
            found: list[list[int]] = [[] for _ in requests]
            for event in engine.generate(requests):
                found[event.request].append(event.token_id)
            texts += found
            room.append(cache._num_rows * cache._num_positions)
    return room, texts


def test_room_of_ended_texts_is_given_back() -> None:
    """Never more than the rows in use times the longest that one of them may become."""
    ((room, texts),) = run_ranks(1, room_over_time, tiny_config(model=MODEL))
    length = len(PROMPTS[0])
    assert room[:3] == [8 * (length + 4), length + 90, 8 * (length + 4)]
    assert room[3] == room[2]  # what fits is not allocated anew
    assert all(text == texts[0] for text in (*texts[:8], *texts[9:]))
    assert texts[8][:4] == texts[0]


class Recorded(list[torch.Tensor]):
    """Blocks of a cache, and the most memory that it had while one of them was replaced."""

    def __init__(self, cache: KeyValueCache, blocks: Sequence[torch.Tensor], peaks: list[int]) -> None:
        super().__init__(blocks)
        self._cache, self._peaks = cache, peaks

    def __setitem__(self, layer: Any, new: Any) -> None:
        self._peaks.append(self._cache.num_bytes + new.nbytes)
        super().__setitem__(layer, new)


def within_a_limit(
    config: RunConfig, num_tokens: int | None
) -> tuple[list[list[int]], int, int | None, str, list[float]]:
    """Entry point of a rank: short texts, a long one and short ones, in a cache of limited room."""
    lengths = [(3, 5)] * 9 + [(17, 60)] + [(8, 9), (1, 20)] * 3
    requests = [
        GenerationRequest(prompt_ids=LONG[:length], max_new_tokens=count, decoding=GREEDY) for length, count in lengths
    ]
    texts: list[list[int]] = [[] for _ in requests]
    scored = [ScoreRequest(LONG[:length], LONG[length : length + 9]) for length in range(1, 30)]
    with GenerationEngine(build(config), max_batch_size=8) as engine:
        cache, peaks, refusal = engine._runner._cache, [0], ""
        one_token = sum(block.shape[1] * block.shape[3] * 4 for block in (*cache._keys, *cache._values))
        limit = (10**6 if num_tokens is None else num_tokens) * one_token
        if num_tokens is not None:
            engine.limit_cache(limit * (1 + torch.distributed.get_rank()))  # the rank with the least decides
        cache._keys, cache._values = (Recorded(cache, blocks, peaks) for blocks in (cache._keys, cache._values))
        for event in engine.generate(requests):
            texts[event.request].append(event.token_id)
        scores = dict(engine.score(scored))
        try:
            engine.submit(GenerationRequest(prompt_ids=LONG, max_new_tokens=60))
        except ConfigError as error:
            refusal = str(error)
        assert max(peaks) <= limit
        return texts, max(peaks), engine.max_cache_tokens, refusal, [scores[i].log_likelihood for i in range(29)]


@pytest.mark.parametrize("name", ["TP1", "PP2"])
def test_a_cache_never_takes_more_than_its_limit(name: str) -> None:
    world_size, parallel = LAYOUTS[name]
    config = tiny_config(model=MODEL, parallel=parallel)
    (free, free_peak, _, _, free_scores), *_ = run_ranks(world_size, within_a_limit, config, None)
    of_ranks = run_ranks(world_size, within_a_limit, config, 100)
    assert len({tokens for _, _, tokens, _, _ in of_ranks}) == 1
    for texts, peak, tokens, refusal, scores in of_ranks:
        assert texts == free, "texts wait, and are the same"
        assert tokens is not None
        assert 77 <= tokens < 100, "a long text, and room for a resize"
        assert peak < free_peak / 3
        assert f"do not fit into the cache, which has room for {tokens} tokens" in refusal
        np.testing.assert_allclose(scores, free_scores, rtol=1e-5)


def test_a_cache_without_room_for_a_token_is_refused() -> None:
    with pytest.raises(RankFailedError, match="less than the keys and values of a token take"):
        run_ranks(1, within_a_limit, tiny_config(model=MODEL), 0)
