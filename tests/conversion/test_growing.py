"""Larger models that compute what the smaller ones do: every architecture, random sizes, several layouts."""

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megatron_7b.checkpoint import read_config, read_manifest
from megatron_7b.checkpoint.weights import CheckpointWeights
from megatron_7b.config.schema import ModelConfig
from megatron_7b.conversion.checkpoint_logits import checkpoint_logits
from megatron_7b.conversion.growing import GrowOptions, grow_checkpoint, plan_growth, widening
from megatron_7b.conversion.growing.weights import grow_weights
from megatron_7b.conversion.parity import random_tokens
from megatron_7b.errors import ConfigError, ConversionError
from megatron_7b.model.kinds import parameter_table
from tests.conversion.growing_models import (
    ARCHITECTURES,
    random_model,
    random_options,
    sharded_logits,
    write_random,
)
from tests.support.ranks import run_ranks

LLAMA = ModelConfig(
    num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, vocab_size=101,
    max_position_embeddings=64, transformer_impl="local",
)  # fmt: skip


def grow(source: Path, output: Path, **options: object) -> dict[str, str]:
    """Grow a checkpoint; returns what was reported last of each topic."""
    said: dict[str, str] = {}
    grow_checkpoint(source, output, GrowOptions(**options), said.__setitem__)  # type: ignore[arg-type]
    return said


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_random_sizes_compute_the_same(architecture: str, tmp_path: Path) -> None:
    draw, sharded, expected = random.Random(architecture), [], []
    for number in range(3):
        model = random_model(architecture, draw)
        options = random_options(model, draw)
        source, large = write_random(tmp_path / f"c{number}", model), tmp_path / f"d{number}"
        grow_checkpoint(source, large, options, lambda *_: None)
        assert read_config(large).model == plan_growth(model, options).target
        tokens = random_tokens(model.vocab_size or 0, length=40)
        reference = checkpoint_logits(source, tokens, arithmetic=torch.float64)[..., : model.vocab_size]
        assert reference.std() > 0.1, "logits so small would agree whatever the weights"
        logits = checkpoint_logits(large, tokens, arithmetic=torch.float64)[..., : model.vocab_size]
        # Copies change nothing; the factor of channels that are filled up is rounded to FP32.
        tolerance = 1e-7 if plan_growth(model, options).duplicates_stream else 2e-6
        assert (logits - reference).abs().max() <= tolerance * reference.abs().max()
        sharded.append((large, tokens.numpy()))
        expected.append(reference)
    (results, _) = run_ranks(2, sharded_logits, sharded)
    for result, reference in zip(results, expected, strict=True):
        difference = torch.from_numpy(result)[..., : reference.shape[-1]] - reference
        assert difference.abs().max() <= 1e-5 * reference.abs().max().clamp(min=1)


def test_the_head_for_pairs_of_sentences_computes_the_same() -> None:
    """What no logits show: the pooler, and the two classes that read it."""
    model = replace(random_model("bert", random.Random(2)), add_binary_head=True, vocab_size=50)
    generator = torch.Generator().manual_seed(1)
    small = {name: torch.randn(row.shape, generator=generator) for name, row in parameter_table(model, 50).items()}
    growth = plan_growth(model, GrowOptions(hidden_size=3 * model.hidden_size))
    large = dict(grow_weights(small, growth, 50))

    def classes(weights: Mapping[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        pooled = torch.tanh(weights["pooler.weight"] @ hidden + weights["pooler.bias"])
        return weights["binary_head.weight"] @ pooled + weights["binary_head.bias"]

    hidden = torch.randn(model.hidden_size, generator=generator)
    torch.testing.assert_close(classes(large, hidden.repeat(3)), classes(small, hidden), atol=1e-5, rtol=1e-5)


def test_the_stream_of_a_post_norm_encoder_can_only_be_doubled() -> None:
    model = random_model("bert", random.Random(1))
    hidden = model.hidden_size
    with pytest.raises(ConfigError, match=f"--hidden-size is {hidden + model.head_width}, expected a multiple of"):
        plan_growth(model, GrowOptions(hidden_size=hidden + model.head_width))
    with pytest.raises(ConfigError, match="no layer of bert changes nothing"):
        plan_growth(model, GrowOptions(num_layers=model.num_layers + 1))
    assert plan_growth(model, GrowOptions(num_layers=2 * model.num_layers, method="stack")).preserves is False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing would grow"),
        ({"num_layers": 1}, "--num-layers is 1, expected at least 2"),
        ({"num_layers": 0}, "--num-layers is 0, expected at least 2"),
        ({"hidden_size": 16}, "--hidden-size is 16, expected at least 32"),
        ({"ffn_hidden_size": 47, "hidden_size": -1}, "--ffn-hidden-size is 47, expected at least 48"),
        ({"num_query_groups": 1}, "--num-query-groups is 1, expected at least 2"),
        ({"num_layers": 3, "method": "stack"}, "expected a multiple of 2 for --method stack, .* such as 4;"),
        ({"num_layers": 9, "method": "stack"}, "such as 8 or 10;"),
        ({"num_attention_heads": 7}, "--num-attention-heads is 7, expected a multiple of --num-query-groups"),
        ({"num_attention_heads": 6, "num_query_groups": 3}, None),
        ({"num_attention_heads": 4, "num_query_groups": 4}, None),
        ({"hidden_size": 56, "num_attention_heads": 6, "num_query_groups": 6}, None),
        ({"num_attention_heads": 3, "num_query_groups": 3}, "--num-attention-heads is 3, expected at least 4"),
        ({"num_query_groups": 4, "num_attention_heads": 12}, None),
    ],
)
def test_what_cannot_be(options: dict[str, object], message: str | None) -> None:
    if message is None:
        plan_growth(LLAMA, GrowOptions(**options))  # type: ignore[arg-type]
        return
    with pytest.raises(ConfigError, match=message):
        plan_growth(LLAMA, GrowOptions(**options))  # type: ignore[arg-type]


def test_heads_follow_the_hidden_size() -> None:
    doubled = plan_growth(LLAMA, GrowOptions(hidden_size=64)).target
    assert (doubled.num_attention_heads, doubled.query_groups, doubled.kv_channels) == (8, 4, None)
    odd = plan_growth(LLAMA, GrowOptions(hidden_size=50)).target
    assert (odd.num_attention_heads, odd.query_groups, odd.kv_channels) == (4, 2, 8)
    multi_query = replace(LLAMA, num_query_groups=1)
    assert plan_growth(multi_query, GrowOptions(hidden_size=64)).target.query_groups == 1


def test_new_layers_follow_those_that_they_copy() -> None:
    def silent(before: int, after: int) -> str:
        (layers,) = plan_growth(replace(LLAMA, num_layers=before), GrowOptions(num_layers=after)).layers.values()
        return " ".join(f"{origin.layer}{'*' if origin.is_silent else ''}" for origin in layers)

    assert silent(2, 4) == "0 0* 1 1*"
    assert silent(4, 6) == "0 0* 1 2 2* 3"
    assert silent(2, 6) == "0 0* 0* 1 1* 1*"


def test_stacking_repeats_whole_blocks_and_says_what_it_changes(tmp_path: Path) -> None:
    said = grow(write_random(tmp_path / "c", LLAMA), tmp_path / "d", num_layers=4, method="stack", hidden_size=64)
    assert "stacked layers compute something else: logits with a largest difference" in said["changed"]
    weights = CheckpointWeights(tmp_path / "d")
    for name in weights:
        if ".layers.0." in name and "mlp" not in name and weights[name].dim() == 1:
            assert torch.equal(weights[name], weights[name.replace(".layers.0.", ".layers.2.")])


def test_number_formats(tmp_path: Path) -> None:
    """What is exact in BF16 stays in it; where a factor is not, the result is in FP32."""
    source = write_random(tmp_path / "c", LLAMA, torch.bfloat16)
    tied = write_random(tmp_path / "t", replace(LLAMA, share_embeddings_and_output_weights=True), torch.bfloat16)
    for checkpoint, options, dtype in (
        (source, {"num_layers": 3, "hidden_size": 96, "ffn_hidden_size": 100}, "bfloat16"),
        (source, {"hidden_size": 48}, "float32"),
        (tied, {"hidden_size": 64}, "bfloat16"),
        (tied, {"hidden_size": 96}, "float32"),
    ):
        grow(checkpoint, tmp_path / "d", overwrite=True, **options)
        assert read_manifest(tmp_path / "d").params_dtype == dtype


def test_a_wrong_copy_is_never_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widening.Copies, "share", lambda self, matrix, _: self.repeat(matrix, 1))
    with pytest.raises(ConversionError, match="the larger model computes other logits than the smaller one"):
        grow(write_random(tmp_path / "c", LLAMA), tmp_path / "d", ffn_hidden_size=50)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c"]


def test_copies_part_ways(tmp_path: Path) -> None:
    """No two channels, units or heads have gradients that Adam would turn into the same update."""
    source = write_random(tmp_path / "c", LLAMA)
    grow(source, tmp_path / "d", hidden_size=64, ffn_hidden_size=96)
    grow(source, tmp_path / "e", hidden_size=48, num_layers=4)
    for folder in ("d", "e"):
        (gradients,) = run_ranks(1, gradients_of, tmp_path / folder)
        for name, gradient in ((name, torch.from_numpy(values)) for name, values in gradients.items()):
            directions = gradient / gradient.norm(dim=1, keepdim=True).clamp(min=1e-12)
            alike = (directions @ directions.t()).fill_diagonal_(0.0)
            assert alike.max() < 0.999, name


def gradients_of(folder: Path) -> dict[str, NDArray[np.float32]]:
    """Entry point of a rank: gradients of all matrices of a checkpoint, rows of ids that did not occur left out."""
    from megatron_7b.checkpoint.inference_config import inference_config
    from megatron_7b.checkpoint.open_model import opened_model
    from megatron_7b.conversion.checkpoint_logits import text_inputs
    from megatron_7b.model.builder import named_canonical_parameters

    config = inference_config(folder, {"precision.params_dtype": "fp32", "data.seq_length": 40})
    with opened_model(folder, config) as model:
        parameters = dict(named_canonical_parameters(model.chunks))
        for parameter in parameters.values():  # the linear layers add to it
            parameter.main_grad = torch.zeros_like(parameter)  # type: ignore[attr-defined]
        for sample in random_tokens(101, num_samples=4, length=40):
            logits = model.only_chunk(**text_inputs(sample, model))[0, :, :101].float()
            torch.nn.functional.cross_entropy(logits[:-1], sample[1:]).backward()
        found = {}
        for name, parameter in parameters.items():
            gradient = parameter.main_grad + (0.0 if parameter.grad is None else parameter.grad)  # type: ignore[attr-defined]
            if gradient.dim() == 2 and gradient.any():  # silent layers have none in what their zeros multiply
                found[name] = gradient[gradient.norm(dim=1) > 0].numpy()
        return found
