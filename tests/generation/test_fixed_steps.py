"""Steps of fixed shapes write what other steps write. On a CPU they are run; their graphs are tried in tests/gpu."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_7b.config.schema import RunConfig
from megatron_7b.generation import decoder_runner, fixed_steps
from megatron_7b.generation.engine import GenerationEngine
from megatron_7b.generation.fixed_steps import FixedSteps, reach_of
from megatron_7b.generation.options import BeamOptions, SamplingOptions
from megatron_7b.generation.requests import FinishedSearch, GenerationRequest
from tests.generation.test_engine import GREEDY, MODEL, PROMPTS, build
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import tiny_config

GPT2 = {"architecture": "gpt2", "num_query_groups": None, "num_layers": 2, "init_method_std": 0.2}
MODELS: dict[str, dict[str, Any]] = {
    "rotary": MODEL,
    "windows": {**MODEL, "architecture": "mistral", "qk_layernorm": False, "add_qkv_bias": False, "window_size": 7},
    "learned positions": GPT2,
}


def written(config: RunConfig, fixed: bool) -> tuple[list[Any], int]:
    """Greedy, drawn and searched texts, three at a time, and how many kinds of steps of fixed shape were taken."""
    decoder_runner.can_decode = lambda _model: False  # type: ignore[assignment]
    decoder_runner.takes_fixed_steps = lambda _model: fixed  # type: ignore[assignment]
    fixed_steps._SHORTEST_REACH = 8
    ways = [GREEDY, SamplingOptions(temperature=0.9, seed=5), BeamOptions(num_beams=2), GREEDY]
    requests = [
        GenerationRequest(prompt_ids=prompt, max_new_tokens=count, decoding=way)
        for prompt, way, count in zip(PROMPTS, ways, (30, 9, 12, 40), strict=True)
    ]
    texts: list[Any] = [[] for _ in requests]
    seen: dict[Any, int] = {}
    with GenerationEngine(build(config), max_batch_size=3) as engine:
        assert isinstance(engine._runner, decoder_runner.DecoderRunner)
        steps, cache = engine._runner._steps, engine._runner._cache
        if steps is not None:
            plain_take = steps.take

            def take(*given: Any) -> Tensor:
                logits = plain_take(*given)
                # No step, and so no graph, is used after keys and values have moved.
                assert seen.setdefault(next(reversed(steps._steps.values())), cache.num_resizes) == cache.num_resizes
                return logits

            steps.take = take  # type: ignore[method-assign]
        for event in engine.generate(requests):
            if isinstance(event, FinishedSearch):
                texts[event.request] = [(text.token_ids, round(text.score, 3)) for text in event.hypotheses]
            else:
                texts[event.request].append(event.token_id)
    return texts, len(seen)


@pytest.mark.parametrize("name", MODELS)
def test_texts_are_those_of_other_steps(name: str) -> None:
    config = tiny_config(model={**MODELS[name], "max_position_embeddings": 64})
    ((expected, none),) = run_ranks(1, written, config, False)
    ((texts, num_kinds),) = run_ranks(1, written, config, True)
    assert texts == expected
    assert none == 0
    assert num_kinds > 3


@pytest.mark.parametrize(
    ("needed", "held", "reach"),
    [(1, 900, 256), (256, 900, 256), (257, 900, 512), (1, 100, 100), (5000, 9000, 5120), (5121, 9000, 6144)],
)
def test_reach_is_little_more_than_is_needed(needed: int, held: int, reach: int) -> None:
    assert reach_of(needed, held) == reach


def test_few_shapes_serve_all_lengths() -> None:
    reaches = {reach_of(needed, 32768) for needed in range(1, 32769)}
    assert len(reaches) < 40
    assert all(reach_of(needed, 32768) <= max(needed + 255, 1.25 * needed) for needed in range(1, 32769))


class Replays:
    """A run of steps whose logits are their tokens, one-hot, and graphs of them: a CPU has none of its own.

    Args:
        error: What replays have added to the logits.
    """

    def __init__(self, error: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self._error = error
        self._is_capturing = False
        self._captured: Tensor = torch.zeros(2, 10)
        self.runs: list[list[int]] = []
        self.steps = FixedSteps(self._run, 8, torch.device("cpu"))
        self.steps._captures = True
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph", self._graph)

    def pool(self) -> tuple[int, int]:
        return (0, 1)

    def replay(self) -> None:
        (step,) = self.steps._steps.values()
        self._captured.copy_(torch.nn.functional.one_hot(step.inputs[0].flatten(), 10))
        self._captured += self._error * torch.arange(10)

    @contextlib.contextmanager
    def _graph(self, graph: object, **_options: object) -> Iterator[None]:
        assert graph is self
        self._is_capturing = True
        yield
        self._is_capturing = False

    def _run(self, tokens: Tensor, positions: Tensor, reach: int) -> Tensor:
        assert reach == 16
        assert torch.equal(positions, positions[:1].expand(2, 1))
        self.runs.append(tokens.flatten().tolist())
        return self._captured if self._is_capturing else torch.nn.functional.one_hot(tokens.flatten(), 10).float()


def test_the_second_step_of_a_shape_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    replays = Replays(0.0, monkeypatch)
    steps, runs = replays.steps, replays.runs
    for token in range(5):
        assert steps.take([token, 7 - token], [token, token], 16).argmax(1).tolist() == [token, 7 - token]
    assert runs == [[0, 7], [1, 6], [1, 6]]  # the first, the second, and its capture
    assert steps.num_graphs == 1
    steps.forget()
    assert steps.num_graphs == 0


def test_a_graph_with_other_logits_is_not_used(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    replays = Replays(0.05, monkeypatch)
    steps, runs = replays.steps, replays.runs
    for token in range(4):
        assert steps.take([token, token], [token, token], 16).argmax(1).tolist() == [token, token]
    assert len(runs) == 5
    assert steps.num_graphs == 0
    assert [record.message for record in caplog.records if "without CUDA graphs" in record.message]
