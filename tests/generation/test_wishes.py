"""What a caller may ask of each text by itself: penalties, biases, log probabilities, a grammar."""

import json
import math
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_7b.config.schema import RunConfig
from megatron_7b.errors import ConfigError
from megatron_7b.generation.grammars import Grammar, GrammarVocabulary, ReadyGrammars, token_bytes_of
from megatron_7b.generation.options import BeamOptions, GenerationOptions, SamplingOptions
from megatron_7b.generation.requests import GenerationRequest
from megatron_7b.generation.sampling import TokenSampler
from megatron_7b.generation.settings import GenerationSettings
from megatron_7b.tokenizer import load_tokenizer
from tests.generation.test_engine import PROMPTS, build
from tests.generation.test_text_stream import save_tokenizer
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import tiny_config

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 5}, "n": {"type": "integer", "maximum": 99}},
        "required": ["name", "n"],
        "additionalProperties": False,
    }
)


def chosen(options: SamplingOptions, logits: list[float], count: int, **others: Any) -> list[int]:
    sampler = TokenSampler(options, **others)
    return [sampler.choose(torch.tensor(logits)) for _ in range(count)]


def test_penalties_count_tokens_of_the_answer() -> None:
    logits = [3.0, 2.5, 2.0]
    assert chosen(SamplingOptions(temperature=0.0), logits, 3) == [0, 0, 0]
    # 3.0 - 0.6 < 2.5; then 2.5 - 0.6 < 2.0 and 3.0 - 0.6 is the largest again, for good: it counts once
    assert chosen(SamplingOptions(temperature=0.0, presence_penalty=0.6), logits, 4) == [0, 1, 0, 0]
    # after [0, 1, 0]: 3.0 - 1.2, 2.5 - 0.6, 2.0
    assert chosen(SamplingOptions(temperature=0.0, frequency_penalty=0.6), logits, 5) == [0, 1, 0, 2, 1]
    assert chosen(SamplingOptions(temperature=0.0, presence_penalty=0.6), logits, 1, prompt_ids=[0]) == [0]


def test_biases_and_a_shortest_length() -> None:
    logits = [3.0, 2.5, 2.0]
    assert chosen(SamplingOptions(temperature=0.0, logit_bias=((2, 1.5),)), logits, 1) == [2]
    shortest = SamplingOptions(temperature=0.0, min_new_tokens=2)
    assert chosen(shortest, logits, 3, stop_ids=[0]) == [1, 1, 0]


def write(config: RunConfig, wishes: list[SamplingOptions]) -> list[tuple[list[int], list[Any]]]:
    """Entry point of a rank: tokens and log probabilities of texts that are written side by side."""
    from megatron_7b.generation.engine import GenerationEngine

    texts: list[tuple[list[int], list[Any]]] = [([], []) for _ in wishes]
    requests = [
        GenerationRequest(prompt_ids=prompt, max_new_tokens=6, decoding=wish)
        for prompt, wish in zip(PROMPTS, wishes, strict=False)
    ]
    with GenerationEngine(build(config)) as engine:
        for event in engine.generate(requests):
            texts[event.request][0].append(event.token_id)
            texts[event.request][1].append(event.logprobs)
    return texts


@pytest.mark.parametrize("parallel", [{"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}])
def test_each_text_has_its_own_wishes_at_every_layout(parallel: dict[str, int]) -> None:
    model = {"init_method_std": 0.2}
    wishes = [
        SamplingOptions(temperature=0.0),
        SamplingOptions(temperature=0.0, logprobs=3),
        SamplingOptions(temperature=0.7, seed=3, presence_penalty=1.0, logprobs=0),
        SamplingOptions(temperature=0.0, logit_bias=((7, 100.0),)),
    ]
    (alone,) = run_ranks(1, write, tiny_config(model=model), wishes)
    for texts in run_ranks(2, write, tiny_config(model=model, parallel=parallel), wishes):
        assert [ids for ids, _ in texts] == [ids for ids, _ in alone]
        assert texts[3][0] == [7] * 6
        assert texts[0][1] == [None] * 6
        for own, other in zip(texts[1][1], alone[1][1], strict=True):
            assert own.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert own.logprob == own.top[0][1] == max(value for _, value in own.top)  # greedy
            assert len(own.top) == 3
        assert [one.top for one in texts[2][1]] == [()] * 6
        assert all(one.logprob < 0 for one in texts[2][1])


def test_impossible_wishes_are_refused() -> None:
    with pytest.raises(ConfigError, match="presence_penalty is nan.*; .*min_new_tokens is -1.*; logprobs is 101"):
        GenerationOptions(presence_penalty=math.nan, min_new_tokens=-1, logprobs=101)
    with pytest.raises(ConfigError, match="logprobs needs num_beams 1"):
        GenerationOptions(logprobs=2, num_beams=4).resolve(GenerationSettings())
    with pytest.raises(ConfigError, match="the JSON schema is no JSON"):
        Grammar("json_schema", "{")
    with pytest.raises(ConfigError, match="cannot be followed"):
        Grammar("json_schema", '{"type": "strange"}')
    with pytest.raises(ConfigError, match="the pattern cannot be followed"):
        Grammar("regex", "(")
    assert isinstance(GenerationOptions(num_beams=2).resolve(GenerationSettings())[0], BeamOptions)


def random_text(vocabulary: GrammarVocabulary, grammar: Grammar, vocab_size: int, seed: int, at_most: int) -> list[int]:
    """Tokens that random logits lead to under a grammar; without the one that ends the text."""
    generator = torch.Generator().manual_seed(seed)
    sampler = TokenSampler(SamplingOptions(seed=seed), grammar=(vocabulary, grammar), stop_ids=vocabulary.stop_ids)
    ids: list[int] = []
    while len(ids) < at_most:
        ids.append(sampler.choose(torch.randn(vocab_size, generator=generator)))
        if ids[-1] in vocabulary.stop_ids:
            return ids[:-1]
    raise AssertionError("the text did not end")


@pytest.mark.parametrize("kind", ["byte-level", "bytes", "tiktoken", "byte-fallback"])
def test_random_texts_fit_their_grammar(kind: str, tmp_path: Path) -> None:
    """Whatever the model finds probable; with tokens that are bytes, and with others."""
    if kind != "bytes":
        save_tokenizer(kind, tmp_path / "t")
    tokenizer = load_tokenizer("bytes" if kind == "bytes" else tmp_path / "t")
    assert len(token_bytes_of(tokenizer)) == tokenizer.vocab_size
    end = tokenizer.vocab_size - 1 if tokenizer.eod_id is None else tokenizer.eod_id
    vocabulary = GrammarVocabulary(tokenizer, [end])
    for seed in range(5):
        text = tokenizer.decode(
            random_text(vocabulary, Grammar("json_schema", SCHEMA), tokenizer.vocab_size, seed, 400)
        )
        found = json.loads(text)
        assert set(found) == {"name", "n"}
        assert len(found["name"]) <= 5
        assert isinstance(found["n"], int)
        words = tokenizer.decode(
            random_text(vocabulary, Grammar("regex", "(yes|no), [a-c]{3}"), tokenizer.vocab_size, seed, 40)
        )
        assert re.fullmatch("(yes|no), [a-c]{3}", words.strip())


def test_a_grammar_is_made_ready_once_and_followed_by_each_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """By whoever prepares it: a server's engine would let all other texts wait."""
    tokenizer = load_tokenizer("bytes")
    made, make = [], GrammarVocabulary._make_ready

    def noted(vocabulary: GrammarVocabulary, grammar: Grammar) -> Any:
        made.append(grammar)
        time.sleep(0.05)
        return make(vocabulary, grammar)

    monkeypatch.setattr(GrammarVocabulary, "_make_ready", noted)
    vocabulary = GrammarVocabulary(tokenizer, [tokenizer.vocab_size - 1])
    grammar = Grammar("regex", "ab?c")
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(vocabulary.prepare, [grammar] * 3))
    states = [vocabulary.follow(grammar) for _ in range(2)]
    assert made == [grammar]
    states[0].accept(ord("a"))
    allowed = [np.flatnonzero(state.allowed(tokenizer.vocab_size)).tolist() for state in states]
    assert allowed == [[ord("b"), ord("c")], [ord("a")]]


def test_the_memory_of_ready_grammars_is_bounded() -> None:
    made: list[str] = []
    ready = ReadyGrammars(lambda grammar: made.append(grammar.text) or grammar.text)
    small = [Grammar("regex", f"a{{{number}}}") for number in range(70)]
    assert [ready(grammar) for grammar in small] == made
    assert len(ready) == 64
    ready(small[10])  # among the last 64: there already, and now the newest
    assert len(made) == 70
    large = Grammar("json_object", "x" * (2 * 2**20 - len(small[10].text)))
    ready(large)
    assert len(ready) == 2, "the newest of the small ones has room beside it"
    ready(small[10])
    assert len(made) == 71
    ready(Grammar("json_object", "x" * 3 * 2**20))
    assert len(ready) == 1, "a text needs it, however large it is"

    def fails(grammar: Grammar) -> None:
        made.append(grammar.text)
        raise ConfigError("no")

    ready = ReadyGrammars(fails)
    for _ in range(2):
        with pytest.raises(ConfigError, match="no"):
            ready(small[0])
    assert (made[-2:], len(ready)) == ([small[0].text] * 2, 0)


def test_other_threads_run_while_a_grammar_is_made_ready() -> None:
    """Which is llguidance's to see to: what takes its time there must not hold the interpreter."""
    fields = {
        f"f{i}": {"properties": {f"x{j}": {"enum": [f"v{k}" for k in range(20)]} for j in range(10)}}
        for i in range(150)
    }
    grammar = Grammar("json_schema", json.dumps({"type": "object", "properties": fields}))
    vocabulary = GrammarVocabulary(load_tokenizer("bytes"), [0])
    vocabulary.prepare()
    preparing = threading.Thread(target=vocabulary.prepare, args=[grammar])
    preparing.start()
    num_turns = 0
    while preparing.is_alive():
        num_turns += 1
        time.sleep(0.001)
    assert num_turns > 5


def test_a_grammar_that_no_text_fits_is_refused_ahead() -> None:
    vocabulary = GrammarVocabulary(load_tokenizer("bytes"), [0])
    with pytest.raises(ConfigError, match="the JSON schema cannot be followed: "):
        vocabulary.prepare(Grammar("json_schema", '{"$ref": "#"}'))
