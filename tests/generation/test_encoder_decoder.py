"""Texts of an encoder-decoder are those of transformers: greedy and searched, prompts of many lengths at once."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_7b.cli.main import main
from megatron_7b.errors import ConfigError
from megatron_7b.generation.options import BeamOptions, GenerationOptions, SamplingOptions
from megatron_7b.generation.requests import FinishedSearch, GeneratedToken, GenerationRequest
from megatron_7b.generation.settings import GenerationSettings
from megatron_7b.generation.setup import GenerationSetup
from megatron_7b.tokenizer import load_tokenizer
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import tiny_config

VOCAB_SIZE, START_ID = 203, 7
RANDOM = np.random.default_rng(3)
PROMPTS = [tuple(map(int, RANDOM.integers(1, VOCAB_SIZE, size=length))) for length in (3, 40, 1, 9, 150)]
STOP_IDS = [list(map(int, RANDOM.permutation(VOCAB_SIZE)[:count])) for count in (12, 12, 30, 1)]
GREEDY: dict[str, Any] = {}
FIELDS: list[dict[str, Any]] = [
    GREEDY,
    {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 1.5},
    {"num_beams": 3, "num_return_sequences": 2, "early_stopping": True, "repetition_penalty": 1.3},
    {"num_beams": 2, "num_return_sequences": 1, "length_penalty": 0.0, "early_stopping": "never"},
]
NUM_NEW = 20

type Texts = list[list[tuple[tuple[int, ...], float]]]
"""Of each prompt the texts, the best first, and their scores, 0 if there is none."""


@pytest.fixture(scope="module", params=["gated-gelu", "relu"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of a random model, T5 1.1 or 1.0, and the checkpoint made of it."""
    from transformers import T5Config, T5ForConditionalGeneration

    is_older = request.param == "relu"
    network = T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCAB_SIZE, d_model=48, d_kv=12, d_ff=80, num_heads=4, num_layers=2,
            relative_attention_num_buckets=12, relative_attention_max_distance=30, tie_word_embeddings=is_older,
            feed_forward_proj=request.param, pad_token_id=0, eos_token_id=1, decoder_start_token_id=START_ID,
        )
    )  # fmt: skip
    if not is_older:
        network.lm_head.weight = torch.nn.Parameter(torch.empty(VOCAB_SIZE, 48))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            spread = 0.5 if "bias" in name else 0.12
            parameter.copy_(1 + 0.2 * noise if "layer_norm" in name else spread * noise)
    folder = tmp_path_factory.mktemp("t5") / "hf"
    network.save_pretrained(folder)
    checkpoint = folder.parent / "checkpoint"
    assert main(["convert", "from-hf", "--input", str(folder), "--output", str(checkpoint)]) == 0
    return folder, checkpoint


def of_transformers(folder: Path) -> list[Texts]:
    """Write with transformers, all prompts in one batch, filled up on the right."""
    from transformers import T5ForConditionalGeneration

    network = T5ForConditionalGeneration.from_pretrained(folder)
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in PROMPTS])
    mask = torch.tensor([[*[1] * len(prompt), *[0] * (longest - len(prompt))] for prompt in PROMPTS])
    results = []
    for fields, stop_ids in zip(FIELDS, STOP_IDS, strict=True):
        found = network.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=NUM_NEW,
            eos_token_id=stop_ids,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
            **fields,
        )
        texts: Texts = [[] for _ in PROMPTS]
        scores = found.sequences_scores.tolist() if fields else [0.0] * len(PROMPTS)
        assert found.sequences[:, 0].tolist() == [START_ID] * len(found.sequences)
        for index, (row, score) in enumerate(zip(found.sequences[:, 1:].tolist(), scores, strict=True)):
            end = next((place + 1 for place, token in enumerate(row) if token in stop_ids), NUM_NEW)
            texts[index // fields.get("num_return_sequences", 1)].append((tuple(row[:end]), score))
        results.append(texts)
    return results


def of_ours(checkpoint: Path, parallel: Mapping[str, int]) -> list[Texts]:
    from megatron_7b.checkpoint.inference_config import inference_config
    from megatron_7b.checkpoint.open_model import opened_model
    from megatron_7b.generation.engine import GenerationEngine

    overrides = {"runtime.num_threads": 1, **{f"parallel.{name}": size for name, size in parallel.items()}}
    results = []
    with opened_model(checkpoint, inference_config(checkpoint, overrides)) as opened:
        tokens = torch.tensor([PROMPTS[1]])
        answer = torch.tensor([[START_ID, 3, 5]])
        with torch.no_grad():
            before = opened.only_chunk(tokens, answer)
        for fields, stop_ids in zip(FIELDS, STOP_IDS, strict=True):
            decoding = BeamOptions(**fields) if fields else SamplingOptions(temperature=0.0)
            requests = [
                GenerationRequest(prompt_ids=prompt, max_new_tokens=NUM_NEW, decoding=decoding) for prompt in PROMPTS
            ]
            # Places for some of the texts only, so that they come and go.
            with GenerationEngine(
                opened.only_chunk, stop_ids=stop_ids, max_batch_size=9 if fields else 2,
                decoder_start_id=START_ID,
            ) as engine:  # fmt: skip
                results.append(texts_of(engine.generate(requests)))
        with torch.no_grad():
            assert torch.equal(opened.only_chunk(tokens, answer), before)  # the model is as it was
    return results


def texts_of(events: Any) -> Texts:
    drawn: list[list[int]] = [[] for _ in PROMPTS]
    texts: Texts = [[] for _ in PROMPTS]
    for event in events:
        if isinstance(event, GeneratedToken):
            drawn[event.request].append(event.token_id)
        else:
            assert isinstance(event, FinishedSearch)
            texts[event.request] = [(found.token_ids, found.score) for found in event.hypotheses]
    return [found or [(tuple(ids), 0.0)] for found, ids in zip(texts, drawn, strict=True)]


def long_texts(checkpoint: Path) -> list[list[int]]:
    """Greedy tokens with a cache that has room for few, and for all."""
    from megatron_7b.checkpoint.inference_config import inference_config
    from megatron_7b.checkpoint.open_model import opened_model
    from megatron_7b.generation import encoder_decoder_runner
    from megatron_7b.generation.engine import GenerationEngine

    results = []
    with opened_model(checkpoint, inference_config(checkpoint)) as opened:
        for encoder_decoder_runner.TOKENS_AHEAD in (3, 1000):
            request = GenerationRequest(
                prompt_ids=PROMPTS[0], max_new_tokens=50, decoding=SamplingOptions(temperature=0.0)
            )
            with GenerationEngine(opened.only_chunk, decoder_start_id=START_ID) as engine:
                results.append([event.token_id for event in engine.generate([request])])
    return results


def test_the_cache_grows_with_a_text(model: tuple[Path, Path]):
    ((grown, reserved),) = run_ranks(1, long_texts, model[1])
    assert len(grown) == 50
    assert grown == reserved


def within_a_limit(checkpoint: Path) -> tuple[list[list[int]], list[list[int]], int]:
    """Entry point of a rank: texts with and without a limit of 150 tokens, and the most that there was room for."""
    from megatron_7b.checkpoint.inference_config import inference_config
    from megatron_7b.checkpoint.open_model import opened_model
    from megatron_7b.generation.engine import GenerationEngine

    # Long texts of short prompts, then the other way around: each cache must give back what the other needs.
    lengths = [(3, 20)] * 6 + [(70, 3)] * 2 + [(2, 90)] + [(10, 10)] * 4
    requests = [
        GenerationRequest(
            prompt_ids=PROMPTS[0][:1] * length, max_new_tokens=count, decoding=SamplingOptions(temperature=0.0)
        )
        for length, count in lengths
    ]
    results, most = [], 0
    with opened_model(checkpoint, inference_config(checkpoint)) as opened:
        for limit in (None, 150):
            with GenerationEngine(opened.only_chunk, decoder_start_id=START_ID, max_batch_size=6) as engine:
                cache = engine._runner._cache  # type: ignore[attr-defined]
                if limit is not None:
                    widths = [block.shape[1] * block.shape[3] * 4 for block in (*cache._keys, *cache._values)]
                    engine.limit_cache(limit * (sum(widths) + max(widths)))
                    assert engine.max_cache_tokens == limit
                found: list[list[int]] = [[] for _ in requests]
                for event in engine.generate(requests):
                    found[event.request].append(event.token_id)
                    most = max(most, engine.num_cached_tokens) if limit else 0
                results.append(found)
    return *results, most


def test_both_caches_share_a_limit(model: tuple[Path, Path]):
    ((free, limited, most),) = run_ranks(1, within_a_limit, model[1])
    assert limited == free
    assert 93 <= most <= 150


def test_a_conversation_is_refused_and_a_source_ends_as_in_training():
    tokenizer = load_tokenizer("bytes")
    config = tiny_config(model={"architecture": "t5", "num_query_groups": None})
    setup = GenerationSetup(Path(), config, tokenizer, GenerationSettings(decoder_start_id=3))
    with pytest.raises(ConfigError, match="reads a text, not a conversation"):
        setup.encode_chat([{"role": "user", "content": "x"}])
    prompt = setup.encode("ab")
    assert prompt.is_source
    assert prompt.ids == (97, 98, tokenizer.eod_id)
    assert setup.encode("").ids == (tokenizer.eod_id,)
    assert setup.decoder_start_id == 3
    ((request,),) = setup.requests([prompt], GenerationOptions(max_new_tokens=5000))  # its length has no limit
    assert request.max_new_tokens == 5000


def without_scores(texts: Sequence[Sequence[tuple[tuple[int, ...], float]]]) -> list[list[tuple[int, ...]]]:
    return [[ids for ids, _ in found] for found in texts]


def test_texts_and_scores_are_those_of_transformers(model: tuple[Path, Path]):
    folder, checkpoint = model
    expected = of_transformers(folder)
    lengths = {len(ids) for texts in expected for found in texts for ids, _ in found}
    assert NUM_NEW in lengths
    assert len(lengths) > 3  # some end on their own
    for tp in (1, 2):
        for results in run_ranks(tp, of_ours, checkpoint, {"tensor_model_parallel_size": tp}):
            for ours, theirs, fields in zip(results, expected, FIELDS, strict=True):
                assert without_scores(ours) == without_scores(theirs), (tp, fields)
                scores = [[[score for _, score in found] for found in texts] for texts in (ours, theirs)]
                np.testing.assert_allclose(*np.array(scores), atol=1e-4, err_msg=str((tp, fields)))
