"""Sizes against counts done by hand, and against the real weights' shapes where they are at hand."""

import dataclasses
import json
import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_7b.config import ModelConfig, load_config
from megatron_7b.errors import ConfigError
from megatron_7b.model.sizes import (
    count_multiplied_parameters,
    count_parameters,
    flops_per_token,
    padded_vocab_size,
)
from tests.support.assets import asset

# h 8, 2 heads of 4, 1 group, ffn 12, v 10: qkv [16, 8], projection [8, 8], fc1 [24, 8], fc2 [8, 12].
SMALL = ModelConfig(
    num_layers=3, hidden_size=8, ffn_hidden_size=12, num_attention_heads=2, num_query_groups=1, vocab_size=10
)


def test_every_part_counted_by_hand():
    per_layer = 16 * 8 + 8 * 8 + 24 * 8 + 8 * 12 + 2 * 8
    assert count_parameters(SMALL) == 2 * 10 * 8 + 3 * per_layer + 8


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"share_embeddings_and_output_weights": True}, -10 * 8),
        ({"add_qkv_bias": True}, 3 * 16),
        ({"qk_layernorm": True}, 3 * 2 * 4),
        ({"num_query_groups": None}, 3 * 8 * 8),
        ({"kv_channels": 8}, 3 * (16 * 8 + 8 * 8)),
        ({"vocab_size": 11}, 2 * 8),
        ({"num_layers": 4}, 16 * 8 + 8 * 8 + 24 * 8 + 8 * 12 + 2 * 8),
    ],
)
def test_each_option_adds_its_own_parameters(change, difference):
    assert count_parameters(dataclasses.replace(SMALL, **change)) - count_parameters(SMALL) == difference


def test_count_equals_the_shapes_in_a_published_checkpoint():
    """SmolLM2-135M as its authors published it: the safetensors header lists every tensor's shape."""
    folder = asset("smollm2-135m")
    published = json.loads((folder / "config.json").read_text())
    with (folder / "model.safetensors").open("rb") as stream:
        header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
    shapes = {name: tensor["shape"] for name, tensor in header.items() if name != "__metadata__"}
    model = ModelConfig(
        num_layers=published["num_hidden_layers"],
        hidden_size=published["hidden_size"],
        ffn_hidden_size=published["intermediate_size"],
        num_attention_heads=published["num_attention_heads"],
        num_query_groups=published["num_key_value_heads"],
        vocab_size=published["vocab_size"],
        share_embeddings_and_output_weights=True,
    )
    tied_copy = math.prod(shapes.get("lm_head.weight", [0]))
    assert count_parameters(model) == sum(math.prod(shape) for shape in shapes.values()) - tied_copy


def test_the_size_of_the_vocabulary_has_to_come_from_somewhere():
    unknown = dataclasses.replace(SMALL, vocab_size=None)
    with pytest.raises(ConfigError, match=r"model\.vocab_size"):
        count_parameters(unknown)
    assert count_parameters(unknown, vocab_size=10) == count_parameters(SMALL)


@given(st.integers(1, 300_000), st.integers(1, 512), st.integers(1, 16))
def test_padding_is_the_least_that_both_divide(vocab_size, divisible_by, tensor_parallel):
    padded = padded_vocab_size(vocab_size, divisible_by, tensor_parallel)
    assert padded % divisible_by == 0
    assert padded % tensor_parallel == 0
    assert 0 <= padded - vocab_size < math.lcm(divisible_by, tensor_parallel)


def test_padding_leaves_fitting_sizes_alone():
    assert padded_vocab_size(32000, 128, 2) == 32000
    assert padded_vocab_size(50257, 128, 8) == 50304
    assert padded_vocab_size(49152, 128, 3) == 49152
    assert padded_vocab_size(32000, 128, 3) == 32256


def test_flops_are_three_forwards_over_the_causal_half():
    per_layer = 16 * 8 + 8 * 8 + 24 * 8 + 8 * 12
    # Attention by enumeration: query i sees i + 1 keys; the half-square formula leaves out half of the diagonal.
    s = 6
    exact_pairs = sum(i + 1 for i in range(s)) - s / 2
    attention = 2 * 2 * (2 * 4) * exact_pairs / s
    assert flops_per_token(SMALL, s) == 3 * (2 * (3 * per_layer + 10 * 8) + 3 * attention)


def test_flops_count_a_shared_output_layer_but_no_look_up():
    shared = dataclasses.replace(SMALL, share_embeddings_and_output_weights=True)
    assert flops_per_token(shared, 64) == flops_per_token(SMALL, 64)


def test_flops_of_llama2_7b_are_six_per_parameter_and_the_attention():
    model = load_config("llama2_7b").model
    multiplied = count_multiplied_parameters(model)
    assert count_parameters(model) - multiplied == 32000 * 4096 + 65 * 4096  # the embedding, and the norms
    assert flops_per_token(model, 1) == pytest.approx(6 * multiplied, rel=1e-4)
    assert flops_per_token(model, 4096) - flops_per_token(model, 0) == 6 * 32 * 4096 * 4096


def test_an_encoder_decoder_counted_by_hand():
    """Texts of 40 tokens with answers of 10: what each token is multiplied by, and what it attends to."""
    model = ModelConfig(
        architecture="t5", num_layers=3, num_decoder_layers=2, hidden_size=8, ffn_hidden_size=12,
        num_attention_heads=2, kv_channels=5, vocab_size=100,
    )  # fmt: skip
    h, f, q, v, text, answer = 8, 12, 10, 100, 40, 10
    encoder = 3 * (4 * h * q + 3 * h * f)
    decoder = 2 * (4 * h * q + 2 * h * q + 3 * h * f) + h * v
    multiplied = text * encoder + text * 2 * 2 * h * q + answer * decoder
    attended = 3 * text * text + 2 * (answer * answer / 2 + answer * text)
    flops = 3 * (2 * multiplied + 4 * attended * q)
    assert flops_per_token(model, text, predicted_share=answer / text) * text == pytest.approx(flops)
