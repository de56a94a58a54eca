"""Beam search: the texts and scores of transformers, one prompt at a time there and all in one batch here."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_7b.cli.main import main
from megatron_7b.errors import ConfigError
from megatron_7b.generation.beams import assign_rows
from megatron_7b.generation.options import BeamOptions, SamplingOptions
from megatron_7b.generation.requests import FinishedSearch, GeneratedToken, GenerationRequest
from tests.conversion.tiny_models import save_tiny_model, save_tiny_tokenizer
from tests.support.ranks import run_ranks

VOCAB_SIZE = 300
RANDOM = np.random.default_rng(3)
PROMPTS = [tuple(map(int, RANDOM.integers(0, VOCAB_SIZE, size=length))) for length in (3, 11, 1, 6, 11, 2, 19, 5)]
TP2 = {"tensor_model_parallel_size": 2}
LAYOUTS: dict[str, list[tuple[int, dict[str, int]]]] = {
    "llama": [(1, {}), (2, TP2), (3, {"pipeline_model_parallel_size": 3})],
    "gpt2": [(4, {**TP2, "pipeline_model_parallel_size": 2})],
}
"""Ranks and layouts by the model that is tried at them."""
# Options as both libraries take them, the most new tokens, and how many of the tokens end a text.
CASES: list[tuple[dict[str, Any], int, int]] = [
    ({"num_beams": 4, "num_return_sequences": 4}, 12, 30),
    ({"num_beams": 4, "num_return_sequences": 3, "length_penalty": 2.0, "early_stopping": "never"}, 12, 60),
    ({"num_beams": 3, "num_return_sequences": 2, "length_penalty": -0.7, "early_stopping": True}, 10, 60),
    ({"num_beams": 5, "num_return_sequences": 5, "length_penalty": 0.0, "early_stopping": "never"}, 9, 1),
    ({"num_beams": 2, "repetition_penalty": 1.4}, 14, 20),
    ({"num_beams": 6, "num_return_sequences": 6}, 1, 2),
]

type Texts = list[list[tuple[tuple[int, ...], float]]]
"""Of each prompt the texts found and their scores, the best first."""


@pytest.fixture(scope="module", params=list(LAYOUTS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """Name of a model, its Hugging Face folder and the checkpoint made of it."""
    folder = tmp_path_factory.mktemp(request.param) / "hf"
    folder.mkdir()
    save_tiny_tokenizer(folder)
    save_tiny_model(request.param, folder, vocab_size=VOCAB_SIZE)
    checkpoint = folder.parent / "checkpoint"
    assert main(["convert", "from-hf", "--input", str(folder), "--output", str(checkpoint)]) == 0
    return request.param, folder, checkpoint


def of_transformers(folder: Path, searches: Sequence[Any]) -> list[Texts]:
    """Search with transformers, all prompts in one batch, filled up on the left."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(folder)
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[*[0] * (longest - len(prompt)), *prompt] for prompt in PROMPTS])
    mask = torch.tensor([[*[0] * (longest - len(prompt)), *[1] * len(prompt)] for prompt in PROMPTS])
    results = []
    for fields, max_new_tokens, stop_ids in searches:
        found = network.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=stop_ids,
            pad_token_id=VOCAB_SIZE - 1,
            return_dict_in_generate=True,
            output_scores=True,
            **fields,
        )
        texts: Texts = [[] for _ in PROMPTS]
        rows = zip(found.sequences[:, longest:].tolist(), found.sequences_scores.tolist(), strict=True)
        for index, (row, score) in enumerate(rows):
            end = next((place + 1 for place, token in enumerate(row) if token in stop_ids), max_new_tokens)
            texts[index // fields.get("num_return_sequences", 1)].append((tuple(row[:end]), score))
        results.append(texts)
    return results


def of_ours(checkpoint: Path, parallel: Mapping[str, int], searches: Sequence[Any]) -> list[Texts]:
    from megatron_7b.checkpoint.inference_config import inference_config
    from megatron_7b.checkpoint.open_model import opened_model
    from megatron_7b.generation.engine import GenerationEngine

    overrides = {f"parallel.{name}": size for name, size in parallel.items()}
    results = []
    with opened_model(checkpoint, inference_config(checkpoint, {"runtime.num_threads": 1, **overrides})) as opened:
        for fields, max_new_tokens, stop_ids in searches:
            requests = [
                GenerationRequest(prompt_ids=prompt, max_new_tokens=max_new_tokens, decoding=BeamOptions(**fields))
                for prompt in PROMPTS
            ]
            texts: Texts = [[] for _ in requests]
            with GenerationEngine(opened.only_chunk, stop_ids=stop_ids, max_batch_size=17) as engine:
                for event in engine.generate(requests):
                    assert isinstance(event, FinishedSearch)
                    texts[event.request] = [(found.token_ids, found.score) for found in event.hypotheses]
                    for found in event.hypotheses:
                        assert found.finish_reason == ("eod" if found.token_ids[-1] in stop_ids else "length")
            results.append(texts)
    return results


def test_texts_and_scores_are_those_of_transformers_at_every_layout(model: tuple[str, Path, Path]):
    name, folder, checkpoint = model
    # Random logits: each token is about as probable as the others, so a share of them ends a share of the texts.
    stop_ids = [list(map(int, RANDOM.permutation(VOCAB_SIZE)[:count])) for _, _, count in CASES]
    searches = [(fields, limit, ids) for (fields, limit, _), ids in zip(CASES, stop_ids, strict=True)]
    expected = of_transformers(folder, searches)
    lengths = [len(ids) for texts in expected[0] for ids, _ in texts]
    assert max(lengths) == 12
    assert min(lengths) < 12
    for world_size, parallel in LAYOUTS[name]:
        for found in run_ranks(world_size, of_ours, checkpoint, parallel, searches):
            for ours, theirs, search in zip(found, expected, searches, strict=True):
                where = f"{parallel}, {search}"
                assert [[ids for ids, _ in texts] for texts in ours] == [
                    [ids for ids, _ in texts] for texts in theirs
                ], where
                scores = [[[score for _, score in texts] for texts in one] for one in (ours, theirs)]
                np.testing.assert_allclose(*np.array(scores), atol=1e-4, err_msg=where)


def neighbors(checkpoint: Path) -> list[dict[int, Any]]:
    """Return what becomes of two sampled texts alone, and among beam searches that come and go with few places."""
    from megatron_7b.checkpoint.inference_config import inference_config
    from megatron_7b.checkpoint.open_model import opened_model
    from megatron_7b.generation.engine import GenerationEngine

    drawn = [
        GenerationRequest(prompt_ids=prompt, max_new_tokens=12, decoding=SamplingOptions(seed=5), ignore_eod=True)
        for prompt in PROMPTS[:2]
    ]
    searched = [
        GenerationRequest(prompt_ids=prompt, max_new_tokens=4, decoding=BeamOptions(num_beams=3)) for prompt in PROMPTS
    ]
    results: list[dict[int, Any]] = []
    with opened_model(checkpoint, inference_config(checkpoint)) as opened:
        for requests in (drawn, [drawn[0], *searched[:4], drawn[1], *searched[4:]]):
            texts: dict[int, Any] = {}
            with GenerationEngine(opened.only_chunk, stop_ids=range(40), max_batch_size=8) as engine:
                for event in engine.generate(requests):
                    if isinstance(event, GeneratedToken):
                        texts.setdefault(event.request, []).append(event.token_id)
                    else:
                        texts[event.request] = event
            results.append(texts)
    return results


def test_samples_and_searches_share_a_batch(model: tuple[str, Path, Path]):
    ((alone, together),) = run_ranks(1, neighbors, model[2])
    assert [together[0], together[5]] == [alone[0], alone[1]]
    assert len(together) == 2 + len(PROMPTS)


def test_as_few_rows_as_possible_are_copied():
    assert assign_rows([4, 9, 2], [0, 1, 2]) == ([4, 9, 2], [])
    assert assign_rows([4, 9, 2], [2, 0, 1]) == ([2, 4, 9], [])
    assert assign_rows([4, 9, 2], [1, 1, 1]) == ([9, 2, 4], [(9, 2), (9, 4)])
    assert assign_rows([4, 9, 2], [1, 1, 0]) == ([9, 2, 4], [(9, 2)])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_beams": 1}, "num_beams is 1"),
        ({"num_beams": 2, "length_penalty": float("nan")}, "length_penalty is nan"),
        ({"num_beams": 2, "early_stopping": "soon"}, "early_stopping is 'soon'"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences is 3, expected 1 to 2"),
    ],
)
def test_impossible_searches_are_refused(fields: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        BeamOptions(**fields)
