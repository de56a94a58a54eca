"""Attention to a window of the newest tokens: against a mask and transformers, at every layout, with a cache."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megatron_7b.checkpoint import read_config, resolve_checkpoint
from megatron_7b.cli.main import main
from megatron_7b.config.schema import ModelConfig, RunConfig
from megatron_7b.conversion import HuggingFaceFolder, to_hugging_face
from megatron_7b.generation import GenerationOptions, open_session
from megatron_7b.generation.prompts import Prompt
from megatron_7b.model.kinds import kind_of
from megatron_7b.model.sizes import flops_per_token
from megatron_7b.model.windowed_attention import attend_within_window
from tests.conversion.tiny_models import save_tiny_model, save_tiny_tokenizer
from tests.distributed.test_layout_equivalence import LAYOUTS, TOLERANCE
from tests.generation.test_engine import LAYOUTS as GENERATION_LAYOUTS
from tests.generation.test_engine import MODEL as GENERATING
from tests.generation.test_prefix_cache import conversations, texts_of
from tests.model.test_experts import gradients
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import tiny_config, train

MODEL = {"architecture": "qwen3", "qk_layernorm": True, "window_size": 7, "window_attn_skip_freq": (1, 0, 1, 1)}
VOCAB_SIZE = 300
PACKED = {"reset_attention_mask": True}


def windowed(*, window_size: int = 7, **sections: dict[str, Any]) -> RunConfig:
    """At the usual learning rate, norms jump after a few steps, and rounding with them."""
    return tiny_config(model={**MODEL, "window_size": window_size}, optimizer={"lr": 3e-3}, **sections)


def masked(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    s, s_k = query.shape[2], key.shape[2]
    mask = torch.ones(s, s_k, dtype=torch.bool).tril(s_k - s).triu(s_k - s - window + 1)
    return functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)


@pytest.mark.parametrize("window", [1, 2, 64, 100, 129, 500])
def test_blocks_compute_what_a_mask_computes(window: int) -> None:
    for b, s, earlier in itertools.product((1, 2), (1, 63, 64, 65, 130, 300), (0, 70, 200)):
        generator = torch.Generator().manual_seed(s)
        q, k, v = (
            torch.randn(length, b, heads, 4, dtype=torch.float64, generator=generator).permute(1, 2, 0, 3)
            for length, heads in ((s, 4), (s + earlier, 2), (s + earlier, 2))
        )
        results = []
        for attend in (masked, attend_within_window):
            inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            context = attend(*inputs, window)
            context.backward(torch.linspace(-1, 1, context.numel(), dtype=torch.float64).view(context.shape))
            results.append([context.detach(), *(x.grad for x in inputs)])
        for theirs, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_window_costs_less_than_the_whole_text() -> None:
    base = ModelConfig(architecture="mistral", num_layers=2, max_position_embeddings=8192, vocab_size=64)
    windowed = dataclasses.replace(base, window_size=256)
    mixed = dataclasses.replace(base, architecture="qwen2", window_size=256, window_attn_skip_freq=(2,))
    whole, some, none = (kind_of(one).attended_positions(one, 2048, 1.0) for one in (base, mixed, windowed))
    assert (whole, none, some) == (2 * 1024, 2 * (256 - 16), 1024 + 240)
    short = [flops_per_token(one, 200) for one in (base, windowed)]
    assert short[0] == short[1]


@pytest.fixture(scope="module")
def one_rank() -> list[tuple[float, float]]:
    (steps,) = run_ranks(1, train, windowed(), 4)
    return steps


@pytest.mark.parametrize(
    "name",
    ["TP2+SP", "PP2xVPP2", "PP2xTP2, stages of 3 and 1", "DP2", "CP2xTP2+SP", "CP4, full recompute",
     "selective recompute"],
)  # fmt: skip
def test_layouts_give_the_same_losses(name: str, one_rank: list[tuple[float, float]]) -> None:
    world_size, parallel = LAYOUTS[name]
    for steps in run_ranks(world_size, train, windowed(parallel=parallel), 4):
        assert [loss for loss, _ in steps] == pytest.approx([loss for loss, _ in one_rank], rel=TOLERANCE)
        assert [norm for _, norm in steps] == pytest.approx([norm for _, norm in one_rank], rel=1e-4)


@pytest.mark.parametrize("name", ["PP2xVPP2", "CP2xTP2+SP"])
def test_windows_end_with_their_document(name: str, one_rank: list[tuple[float, float]]) -> None:
    (apart,) = run_ranks(1, train, windowed(data=PACKED), 4)
    (without,) = run_ranks(1, train, windowed(data=PACKED, window_size=32), 4)
    assert abs(apart[0][0] - one_rank[0][0]) > 1e-4
    assert abs(apart[0][0] - without[0][0]) > 1e-5, "some documents are longer than the window"
    world_size, parallel = LAYOUTS[name]
    for steps in run_ranks(world_size, train, windowed(parallel=parallel, data=PACKED), 4):
        assert [loss for loss, _ in steps] == pytest.approx([loss for loss, _ in apart], rel=TOLERANCE)


@pytest.fixture(scope="module", params=["mistral_window", "qwen2_windows"])
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of transformers and its checkpoint: 3 layers, of which all or the last two have windows."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "hf").mkdir()
    save_tiny_tokenizer(folder / "hf")
    save_tiny_model(request.param, folder / "hf", vocab_size=VOCAB_SIZE)
    assert main(["convert", "from-hf", "--input", str(folder / "hf"), "--output", str(folder / "c")]) == 0
    return folder / "hf", resolve_checkpoint(folder / "c")


def test_loss_and_gradients_are_those_of_transformers(converted: tuple[Path, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source, checkpoint = converted
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model = dataclasses.replace(read_config(checkpoint).model, transformer_impl="local")
    tokens = np.random.default_rng(2).integers(0, VOCAB_SIZE, (2, 241))  # several windows, of 9 or 70
    output = theirs(input_ids=torch.from_numpy(tokens), labels=torch.from_numpy(tokens))
    output.loss.backward()
    for parameter in theirs.parameters():
        parameter.data, parameter.grad = parameter.grad, None
    theirs.save_pretrained(tmp_path)
    expected = HuggingFaceFolder(tmp_path)
    for world_size, parallel in ((1, {}), (2, {"context_parallel_size": 2})):
        config = dataclasses.replace(tiny_config(data={"seq_length": 240}, parallel=parallel), model=model)
        losses, of_ranks = zip(*run_ranks(world_size, gradients, config, checkpoint, tokens), strict=True)
        assert np.mean(losses) == pytest.approx(output.loss.item(), rel=1e-5)
        ours = {name: torch.from_numpy(value) for name, value in of_ranks[0].items()}
        for name, value in to_hugging_face(ours, model, VOCAB_SIZE):
            torch.testing.assert_close(value, expected[name], atol=2e-5, rtol=1e-4)


PROMPT_LENGTHS, NUM_NEW = (3, 100, 31, 100), 40


def continue_prompts(checkpoint: Path, parallel: dict[str, int], prompts: list[list[int]]) -> list[list[int]]:
    """Entry point of a rank."""
    overrides = {f"parallel.{name}": size for name, size in parallel.items()}
    greedy = GenerationOptions(temperature=0.0, max_new_tokens=NUM_NEW, ignore_eod=True)
    with open_session(checkpoint, overrides=overrides, max_batch_size=3) as session:
        return [
            list(sample.token_ids) for sample in session.generate([Prompt("", tuple(ids)) for ids in prompts], greedy)
        ]


def test_texts_are_those_of_transformers(converted: tuple[Path, Path]) -> None:
    """Prompts and continuations are longer than the window, and rows of the batch are at places of their own."""
    from transformers import AutoModelForCausalLM

    source, checkpoint = converted
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    random = np.random.default_rng(4)
    prompts = [random.integers(0, VOCAB_SIZE, length).tolist() for length in PROMPT_LENGTHS]
    expected = []
    for prompt in prompts:
        found = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=NUM_NEW, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        expected.append(found[0, len(prompt) :].tolist())
    for name in ("TP1", "TP2", "PP2"):
        world_size, parallel = GENERATION_LAYOUTS[name]
        for texts in run_ranks(world_size, continue_prompts, checkpoint, parallel, prompts):
            assert texts == expected


def test_beginnings_that_are_kept_have_windows_too() -> None:
    model = {**GENERATING, "architecture": "qwen3", "add_qkv_bias": False, "max_position_embeddings": 256}
    model |= {"window_size": 50, "window_attn_skip_freq": (2,)}
    found = {}
    for window in (50, None):
        changes = {} if window else {"window_size": None, "window_attn_skip_freq": ()}
        ((plain, _),) = run_ranks(1, conversations, tiny_config(model={**model, **changes}), None)
        ((kept, _),) = run_ranks(1, conversations, tiny_config(model={**model, **changes}), 4000)
        found[window] = texts_of(plain)
        assert texts_of(kept) == texts_of(plain)
    assert found[50] != found[None]
