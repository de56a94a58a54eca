"""Texts that must fit a schema, beside others: what is made of a schema is made while the others are being written."""

import json
import os
import signal
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from megatron_7b.checkpoint.inference_config import inference_config
from megatron_7b.cli.main import main
from megatron_7b.generation.grammars import GrammarVocabulary
from megatron_7b.generation.setup import REQUIREMENTS
from megatron_7b.serving.models import WritingModel
from megatron_7b.serving.opening import read_models
from megatron_7b.serving.options import ServerOptions
from megatron_7b.serving.running import serve
from tests.conversion.tiny_models import save_tiny_model, save_tiny_tokenizer
from tests.support.ranks import run_ranks

SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
STEPS = 5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "hf"
    folder.mkdir()
    save_tiny_tokenizer(folder)
    save_tiny_model("llama", folder, vocab_size=300)
    output = folder.parent / "tiny"
    assert main(["convert", "from-hf", "--input", str(folder), "--output", str(output)]) == 0
    return output


def post(address: str, **content: Any) -> Any:
    body = json.dumps({"prompt": "the cat", **content}).encode()
    request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=60)


def a_schema_among_texts(checkpoint: Path, parallel: dict[str, object]) -> tuple[list[bool], str]:
    """Entry point of a rank: a server two of whose texts are being written when a third one comes with a schema.

    Returns:
        Of each time that this rank made a grammar ready, whether it took more steps meanwhile; and, on the main rank,
        the text.
    """
    took_steps: list[bool] = []
    texts: list[str] = []
    num_steps = threading.Semaphore(0)
    make_ready, write = GrammarVocabulary._make_ready, WritingModel.write

    def waits_for_steps(vocabulary: GrammarVocabulary, grammar: Any) -> Any:
        while num_steps.acquire(blocking=False):  # those before
            pass
        took_steps.append(all(num_steps.acquire(timeout=10) for _ in range(STEPS)))
        return make_ready(vocabulary, grammar)

    def counted(*arguments: Any) -> Any:
        num_steps.release()
        return write(*arguments)

    def ask(address: str) -> None:
        long = {"max_tokens": 200, "ignore_eos": True, "stream": True}
        try:
            streams = [post(address, **long) for _ in range(2)]  # each copy has one
            for stream in streams:
                assert stream.readline().startswith(b"data: {")
            wanted = {"type": "json_schema", "json_schema": {"name": "one", "schema": SCHEMA}}
            with post(address, max_tokens=40, seed=1, response_format=wanted) as reply:
                texts.append(json.load(reply)["choices"][0]["text"])
            for stream in streams:
                stream.close()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GrammarVocabulary, "_make_ready", waits_for_steps)
        patch.setattr(WritingModel, "write", counted)
        config = inference_config(checkpoint, parallel, requirements=REQUIREMENTS)
        models = read_models(checkpoint, config, name="tiny")
        options = ServerOptions(port=0, max_cache_gib=0.01, stop_seconds=1.0)
        serve(models, options, on_ready=lambda address: threading.Thread(target=ask, args=[address]).start())
    return took_steps, "".join(texts)


@pytest.mark.parametrize(
    ("world_size", "sizes"),
    [(1, {}), (2, {"pipeline_model_parallel_size": 2}), (2, {})],
    ids=["one rank", "PP2", "two copies"],
)
def test_others_are_written_while_a_schema_is_made_ready(checkpoint: Path, world_size: int, sizes: dict[str, int]):
    parallel = {f"parallel.{name}": size for name, size in sizes.items()}
    found = run_ranks(world_size, a_schema_among_texts, checkpoint, parallel)
    assert json.loads(found[0][1])["a"] in (1, 2)
    assert [took_steps for took_steps, _ in found] == [[True]] * world_size
