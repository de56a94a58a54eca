"""A real model (9 heads in 3 groups, tied embeddings) against transformers: loss and greedy text, in FP32."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_7b.data import IndexedDataset
from megatron_7b.tokenizer import load_tokenizer
from tests.data.corpora import write_corpus
from tests.evaluation.checkpoints import loss_of, write_smollm2_checkpoint
from tests.support.assets import asset
from tests.support.ranks import run_ranks

SEQ_LENGTH = 64
PROMPTS = ["The state of the union is", "Fellow citizens of the Senate and of the House:", "1, 2, 3,"]
NUM_TOKENS = 20
LAYOUTS = {
    "TP1": (1, {}),
    "TP3": (3, {"parallel.tensor_model_parallel_size": 3}),
    "PP2": (2, {"parallel.pipeline_model_parallel_size": 2}),
    "TP3xPP2": (6, {"parallel.tensor_model_parallel_size": 3, "parallel.pipeline_model_parallel_size": 2}),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    (written,) = run_ranks(1, write_smollm2_checkpoint, folder, asset("smollm2-135m"))
    return written


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The beginnings of two speeches."""
    tokenizer = load_tokenizer(asset("smollm2-135m"))
    with asset("sotu.jsonl").open(encoding="utf-8") as lines:
        texts = [next(lines)[:1200] for _ in range(2)]
    documents = [[*ids, tokenizer.eod_id or 0] for ids in tokenizer.encode_batch(texts)]
    return write_corpus(tmp_path_factory.mktemp("corpus") / "sotu", documents)


@pytest.fixture(scope="module")
def transformers_model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(asset("smollm2-135m"), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def expected_loss(transformers_model: Any, corpus: str) -> float:
    """The loop of corpus_loss's docstring."""
    dataset = IndexedDataset(corpus)
    ids = torch.cat([torch.tensor(dataset.document(i).astype("int64")) for i in range(dataset.num_documents)])
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, SEQ_LENGTH):
            window = ids[start : start + SEQ_LENGTH + 1]
            logits = transformers_model(window[None, :-1]).logits[0]
            total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
    return total / (len(ids) - 1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_loss_is_that_of_transformers(name: str, checkpoint: Path, corpus: str, expected_loss: float) -> None:
    world_size, layout = LAYOUTS[name]
    overrides = {"data.seq_length": SEQ_LENGTH, "training.micro_batch_size": 2, **layout}
    for loss, tokens, _ in run_ranks(world_size, loss_of, checkpoint, corpus, overrides):
        assert tokens == IndexedDataset(corpus).num_tokens - 1
        assert loss == pytest.approx(expected_loss, abs=1e-4)


def greedy_texts(checkpoint: Path, prompts: list[tuple[int, ...]], overrides: Mapping[str, object]) -> list[list[int]]:
    """Entry point of a rank: new tokens of all prompts, generated together."""
    from megatron_7b.checkpoint.inference_config import inference_config
    from megatron_7b.checkpoint.open_model import opened_model
    from megatron_7b.generation.engine import GenerationEngine
    from megatron_7b.generation.options import SamplingOptions
    from megatron_7b.generation.requests import GenerationRequest

    config = inference_config(checkpoint, {"runtime.num_threads": 1, **overrides})
    texts: list[list[int]] = [[] for _ in prompts]
    greedy = SamplingOptions(temperature=0.0)
    with opened_model(checkpoint, config) as model, GenerationEngine(model.only_chunk) as engine:
        requests = [
            GenerationRequest(prompt_ids=prompt, max_new_tokens=NUM_TOKENS, decoding=greedy) for prompt in prompts
        ]
        for token in engine.generate(requests):
            texts[token.request].append(token.token_id)
    return texts


@pytest.mark.parametrize("name", ["TP1", "TP3xPP2"])
def test_greedy_text_is_that_of_transformers(name: str, checkpoint: Path, transformers_model: Any) -> None:
    prompts = [tuple(ids) for ids in load_tokenizer(asset("smollm2-135m")).encode_batch(PROMPTS)]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            output = transformers_model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NUM_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        expected.append(output[0, len(prompt) :].tolist())
    world_size, overrides = LAYOUTS[name]
    for texts in run_ranks(world_size, greedy_texts, checkpoint, prompts, overrides):
        assert texts == expected
