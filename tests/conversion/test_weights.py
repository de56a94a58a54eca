"""Streams of weights: nothing missing, nothing extra, nothing skipped, and one tensor at a time."""

from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor

from megatron_7b.config.schema import ModelConfig
from megatron_7b.conversion import check_hugging_face_shapes, from_hugging_face, plan_weights, to_hugging_face
from megatron_7b.errors import ConversionError
from megatron_7b.model.kinds import parameter_table

MODEL = ModelConfig(num_layers=2, hidden_size=8, ffn_hidden_size=12, num_attention_heads=4, num_query_groups=2)
TIED = ModelConfig(
    num_layers=1, hidden_size=8, ffn_hidden_size=12, num_attention_heads=4, share_embeddings_and_output_weights=True
)
VARIANTS = [
    MODEL,
    TIED,
    ModelConfig(architecture="qwen2", add_qkv_bias=True, num_query_groups=4),
    ModelConfig(architecture="qwen3", qk_layernorm=True, kv_channels=48),
    ModelConfig(architecture="mistral"),
]


def random_weights(model: ModelConfig, vocab_size: int = 10) -> dict[str, Tensor]:
    return {
        name: torch.randn(shape)
        for entry in plan_weights(model, vocab_size)
        for name, shape in zip(entry.hugging_face, entry.mapping.hugging_face_shapes, strict=True)
    }


@pytest.mark.parametrize("model", VARIANTS, ids=lambda model: model.architecture)
def test_the_plan_is_the_model_s_own_list_of_parameters(model: ModelConfig):
    plan = {entry.canonical: entry.mapping.canonical_shape for entry in plan_weights(model, 10)}
    assert plan == {name: parameter.shape for name, parameter in parameter_table(model, 10).items()}


@pytest.mark.parametrize("model", VARIANTS, ids=lambda model: model.architecture)
def test_there_and_back(model: ModelConfig):
    weights = random_weights(model)
    canonical = dict(from_hugging_face(weights, model, 10, padded_vocab_size=16))
    assert canonical["embedding.word_embeddings.weight"].shape == (16, model.hidden_size)
    back = dict(to_hugging_face(canonical, model, 10))
    assert list(back) == list(weights)
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_names_that_do_not_fit_are_all_named():
    weights = random_weights(MODEL)
    del weights["model.norm.weight"]
    weights["model.layers.2.self_attn.q_proj.weight"] = torch.zeros(1)
    with pytest.raises(ConversionError) as caught:
        dict(from_hugging_face(weights, MODEL, 10))
    assert "1 missing:\n  model.norm.weight" in str(caught.value)
    assert "1 unexpected:\n  model.layers.2.self_attn.q_proj.weight" in str(caught.value)
    canonical = {"decoder.layers.9.mlp.linear_fc2.weight": torch.zeros(1)}
    with pytest.raises(ConversionError) as caught:
        dict(to_hugging_face(canonical, MODEL, 10))
    assert "15 missing" in str(caught.value)
    assert "and 3 more" in str(caught.value)
    assert "1 unexpected:\n  decoder.layers.9.mlp.linear_fc2.weight" in str(caught.value)


def test_shapes_are_checked_before_anything_is_read():
    shapes = {name: tuple(tensor.shape) for name, tensor in random_weights(MODEL).items()}
    check_hugging_face_shapes(shapes, MODEL, 10)
    shapes["model.embed_tokens.weight"] = (11, 8)
    shapes["model.norm.weight"] = (9,)
    with pytest.raises(ConversionError) as caught:
        check_hugging_face_shapes(shapes, MODEL, 10)
    assert "model.embed_tokens.weight is [11, 8], config.json makes it [10, 8]" in str(caught.value)
    assert "model.norm.weight is [9], config.json makes it [8]" in str(caught.value)


def test_a_misshapen_tensor_is_named():
    canonical = dict(from_hugging_face(random_weights(MODEL), MODEL, 10))
    canonical["decoder.final_norm.weight"] = torch.zeros(9)
    with pytest.raises(ConversionError, match=r"decoder.final_norm.weight: a tensor has shape \[9\], expected \[8\]"):
        dict(to_hugging_face(canonical, MODEL, 10))


def test_a_tied_output_layer_may_be_repeated_but_not_differ():
    weights = random_weights(TIED)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(1)
    assert "output_layer.weight" not in dict(from_hugging_face(weights, TIED, 10))
    weights["lm_head.weight"][3, 3] += 1
    with pytest.raises(ConversionError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        dict(from_hugging_face(weights, TIED, 10))


class Counting(Mapping[str, Tensor]):
    """A lazy mapping that counts how many tensors have been asked for."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights
        self.num_read = 0

    def __getitem__(self, name: str) -> Tensor:
        self.num_read += 1
        return self.weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def test_tensors_are_read_one_at_a_time():
    source = Counting(random_weights(MODEL))
    stream = from_hugging_face(source, MODEL, 10)
    next(stream)
    assert source.num_read == 1
    canonical = Counting({**dict(stream), "embedding.word_embeddings.weight": torch.zeros(10, 8)})
    assert source.num_read == len(source)
    back = to_hugging_face(canonical, MODEL, 10)
    next(back)
    assert canonical.num_read == 1
