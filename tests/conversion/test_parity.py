"""The comparison itself: what passes, what does not, and what it says."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_7b.conversion.parity import (
    BF16_TOLERANCE,
    check_parity,
    compare_logits,
    hugging_face_logits,
    random_tokens,
)
from megatron_7b.errors import ConversionError
from tests.conversion.tiny_models import save_tiny_model

REFERENCE = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))


def test_equal_logits_pass_whatever_the_padding():
    padded = torch.cat([REFERENCE, torch.full((2, 5, 3), -math.inf)], dim=-1)
    parity = check_parity(REFERENCE, padded, arithmetic=torch.float32)
    assert parity.max_abs_difference == 0
    assert parity.first_position is None
    assert parity.argmax_agreement == 1
    assert parity.num_positions == 10


def test_the_largest_difference_is_found():
    logits = REFERENCE.clone()
    logits[1, 3, 2] += 0.5
    logits[0, 2, 6] -= 0.25
    parity = compare_logits(REFERENCE, logits)
    assert (parity.sample, parity.position, parity.token_id, parity.first_position) == (1, 3, 2, 2)
    assert parity.max_abs_difference == pytest.approx(0.5)
    assert parity.max_rel_difference == pytest.approx(0.5 / REFERENCE.abs().max().item())
    assert parity.rms_rel_difference == pytest.approx(
        math.sqrt((0.25 + 0.0625) / 70) / REFERENCE.std().item(), rel=1e-4
    )
    with pytest.raises(ConversionError) as caught:
        check_parity(REFERENCE, logits, arithmetic=torch.float32)
    assert "sample 1, position 3, token 2" in str(caught.value)
    assert "tolerated is 1.0e-04 in FP32" in str(caught.value)


@pytest.mark.parametrize(("scale", "difference", "passes"), [(1, 0.9e-4, True), (1, 1.1e-4, False), (10, 5e-4, True)])
def test_the_fp32_tolerance_is_absolute_unless_the_logits_are_large(scale: float, difference: float, passes: bool):
    reference = scale * REFERENCE / REFERENCE.std()
    logits = reference.clone()
    logits[0, 0, 0] += difference
    assert compare_logits(reference, logits).is_within(torch.float32) == passes


@pytest.mark.parametrize("share", [0.9, 1.1])
def test_the_bf16_tolerance_is_relative_to_the_spread(share: float):
    difference = share * BF16_TOLERANCE * REFERENCE.std()
    assert compare_logits(REFERENCE, REFERENCE + difference).is_within(torch.bfloat16) == (share < 1)


@pytest.mark.parametrize("side", ["ours", "theirs", "both"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("arithmetic", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_never_passes(side: str, value: float, arithmetic: torch.dtype):
    spoilt = REFERENCE.clone()
    spoilt[0, 0, 0] = value
    reference = REFERENCE if side == "ours" else spoilt
    logits = REFERENCE if side == "theirs" else spoilt
    with pytest.raises(ConversionError, match="not finite"):
        check_parity(reference, logits, arithmetic=arithmetic)


def test_shapes_that_do_not_correspond_are_refused():
    with pytest.raises(ConversionError, match="logits of shape"):
        compare_logits(REFERENCE, REFERENCE[:, :, :-1])
    with pytest.raises(ConversionError, match="logits of shape"):
        compare_logits(REFERENCE, REFERENCE[:, :-1])


def test_tokens_are_reproducible_and_cover_the_vocabulary():
    tokens = random_tokens(10, num_samples=4, length=100)
    assert tokens.shape == (4, 100)
    assert torch.equal(tokens.unique(), torch.arange(10))
    assert torch.equal(tokens, random_tokens(10, num_samples=4, length=100))
    assert not torch.equal(tokens, random_tokens(10, num_samples=4, length=100, seed=1))


def test_transformers_must_load_every_tensor(tmp_path: Path):
    save_tiny_model("llama", tmp_path)
    assert hugging_face_logits(tmp_path, random_tokens(199, length=4)).shape == (2, 4, 199)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"num_hidden_layers": 3', '"num_hidden_layers": 4'))
    with pytest.raises(ConversionError, match=r"does not load .* cleanly.*missing"):
        hugging_face_logits(tmp_path, random_tokens(199, length=4))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConversionError, match="transformers cannot load"):
        hugging_face_logits(tmp_path, random_tokens(199, length=4))


def break_layer_types(config: dict[str, Any]) -> None:
    """Fails in the forward pass."""
    config["layer_types"] = ["sliding_attention"] * 3


def break_rope(config: dict[str, Any]) -> None:
    """Fails in the constructor."""
    config["rope_parameters"] = {"rope_type": "of my own", "rope_theta": 1.0}


def break_activation(config: dict[str, Any]) -> None:
    config["hidden_act"] = "of my own"


def break_length(config: dict[str, Any]) -> None:
    config["layer_types"] = ["full_attention"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_layer_types, "transformers cannot compute with the model in .*: "),
        (break_rope, "transformers cannot load .*: KeyError: 'of my own'"),
        (break_activation, "transformers cannot load .*: "),
        (break_length, "transformers cannot load .*: "),
    ],
)
def test_whatever_transformers_raises_is_about_the_folder(
    damage: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
):
    save_tiny_model("qwen2", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    damage(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=message):
        hugging_face_logits(tmp_path, random_tokens(199, length=4))


def test_a_reference_that_is_not_finite_is_named(tmp_path: Path):
    model = save_tiny_model("llama", tmp_path)
    with torch.no_grad():
        next(model.parameters())[7] = math.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match=r"computes logits that are not finite, by transformers in torch.float32"):
        hugging_face_logits(tmp_path, random_tokens(199))
