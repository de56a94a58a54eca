"""On CUDA: tokens that are appended by CUDA graphs are those of steps that are started kernel by kernel."""

import logging

import pytest
import torch

from megatron_7b.generation.decoder_runner import DecoderRunner
from megatron_7b.generation.engine import GenerationEngine
from megatron_7b.generation.options import SamplingOptions
from megatron_7b.generation.requests import GenerationRequest
from megatron_7b.model.on_ranks import build_on_ranks
from tests.support.tiny_runs import VOCAB_SIZE, tiny_config

pytestmark = [pytest.mark.gpu, pytest.mark.gpu_quick]


def written(
    model: object, requests: list[GenerationRequest], *, cuda_graphs: bool
) -> tuple[list[list[int]], DecoderRunner]:
    texts: list[list[int]] = [[] for _ in requests]
    with GenerationEngine(model, max_batch_size=3, cuda_graphs=cuda_graphs) as engine:
        for event in engine.generate(requests):
            texts[event.request].append(event.token_id)
        assert isinstance(engine._runner, DecoderRunner)
        return texts, engine._runner


@pytest.mark.parametrize(("dtype", "window"), [("fp32", None), ("fp32", 40), ("bf16", None)])
def test_graphs_write_the_same_texts(dtype: str, window: int | None, caplog: pytest.LogCaptureFixture) -> None:
    """Lengths pass 256, the first bound of what a step reads, and texts join and leave."""
    architecture = "llama" if window is None else "mistral"
    model = {"architecture": architecture, "window_size": window, "init_method_std": 0.2}
    config = tiny_config(
        model=model | {"max_position_embeddings": 512}, precision={"params_dtype": dtype}, runtime={"device": "cuda"}
    )
    chunk = build_on_ranks(config, "cuda", is_training=False).only_chunk
    requests = [
        GenerationRequest(
            prompt_ids=tuple(range(1, length)),
            max_new_tokens=count,
            decoding=SamplingOptions(temperature=0.8, seed=length) if length == 9 else SamplingOptions(temperature=0.0),
            ignore_eod=True,
        )
        for length, count in ((5, 300), (9, 20), (200, 90), (17, 40))
    ]
    with caplog.at_level(logging.WARNING):
        texts, runner = written(chunk, requests, cuda_graphs=True)
    assert not caplog.records, caplog.records
    assert runner._steps is not None
    assert runner._steps.num_graphs > 1
    plain, runner = written(chunk, requests, cuda_graphs=False)
    assert runner._steps is None
    assert all(0 <= token < VOCAB_SIZE for text in texts for token in text)
    if dtype == "fp32":
        assert texts == plain
    else:  # near ties may fall another way
        same = [
            sum(a == b for a, b in zip(*pair, strict=True)) / len(pair[0]) for pair in zip(texts, plain, strict=True)
        ]
        assert max(same) == 1.0, same
    torch.cuda.synchronize()
