"""Converted weights compute what transformers computes, by a forward pass that shares no code with either."""

from pathlib import Path

import pytest
import torch

from megatron_7b.conversion import (
    HuggingFaceFolder,
    check_hugging_face_shapes,
    from_hugging_face,
    from_hugging_face_config,
    to_hugging_face,
    to_hugging_face_config,
)
from megatron_7b.conversion.folder_writer import write_weights
from megatron_7b.conversion.json_files import write_json
from megatron_7b.conversion.parity import check_parity, hugging_face_logits, random_tokens
from megatron_7b.errors import ConversionError
from tests.conversion.tiny_models import TINY, save_tiny_model
from tests.support.assets import asset
from tests.support.reference_gpt import reference_logits


@pytest.mark.parametrize("case", TINY)
def test_logits_of_every_family(case: str, tmp_path: Path):
    hugging_face = save_tiny_model(case, tmp_path)
    folder = HuggingFaceFolder(tmp_path)
    model = from_hugging_face_config(folder.config)
    check_hugging_face_shapes(folder.shapes, model, 199)
    tokens = random_tokens(199, length=100)
    with torch.inference_mode():
        expected = hugging_face(input_ids=tokens).logits
    assert expected.std() > 0.5, "logits so small would agree whatever the weights"
    canonical = dict(from_hugging_face(folder, model, 199, padded_vocab_size=256))
    assert canonical["embedding.word_embeddings.weight"].shape[0] == 256
    parity = check_parity(expected, reference_logits(canonical, model, tokens), arithmetic=torch.float32)
    assert parity.argmax_agreement == 1.0


@pytest.mark.parametrize("case", TINY)
@pytest.mark.parametrize("max_shard_bytes", [2**30, 30_000])
def test_there_and_back_is_the_same_folder(case: str, max_shard_bytes: int, tmp_path: Path):
    (tmp_path / "out").mkdir()
    hugging_face = save_tiny_model(case, tmp_path / "in")
    source = HuggingFaceFolder(tmp_path / "in")
    model = from_hugging_face_config(source.config)
    canonical = dict(from_hugging_face(source, model, 199, padded_vocab_size=384))
    write_weights(
        tmp_path / "out",
        to_hugging_face(canonical, model, 199),
        model=model,
        vocab_size=199,
        dtype=torch.float32,
        max_shard_bytes=max_shard_bytes,
    )
    config = to_hugging_face_config(model, vocab_size=199, dtype="float32")
    write_json(tmp_path / "out" / "config.json", config)
    copy = HuggingFaceFolder(tmp_path / "out")
    assert from_hugging_face_config(copy.config) == model
    assert set(copy) == set(source)
    for name in source:
        assert torch.equal(copy[name], source[name]), name
    num_files = len(list((tmp_path / "out").glob("*.safetensors")))
    assert num_files == 1 if max_shard_bytes == 2**30 else num_files > 3
    # transformers loads it cleanly and computes the very same: its own configuration class agrees with ours.
    tokens = random_tokens(199, length=100)
    with torch.inference_mode():
        expected = hugging_face(input_ids=tokens).logits
    assert torch.allclose(hugging_face_logits(tmp_path / "out", tokens), expected, atol=1e-5)


def test_old_spellings_of_the_rotary_embedding_are_understood(tmp_path: Path):
    hugging_face = save_tiny_model("llama3_scaled", tmp_path)
    config = HuggingFaceFolder(tmp_path).config
    rope = config.pop("rope_parameters")
    assert isinstance(rope, dict)
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = {**rope, "type": rope["rope_type"]}
    model = from_hugging_face_config(config)
    assert model.rope_scaling is not None
    assert model.rotary_base == 500.0
    tokens = random_tokens(199, length=100)
    with torch.inference_mode():
        expected = hugging_face(input_ids=tokens).logits
    canonical = dict(from_hugging_face(HuggingFaceFolder(tmp_path), model, 199))
    check_parity(expected, reference_logits(canonical, model, tokens), arithmetic=torch.float32)


@pytest.mark.parametrize(
    ("fault", "suspect"),
    [
        ("model.layers.1.self_attn.k_proj.weight", "queries, keys or the rotary"),
        ("model.layers.1.self_attn.v_proj.weight", "from the first position"),
    ],
)
def test_parity_refuses_a_permuted_head(fault: str, suspect: str, tmp_path: Path):
    hugging_face = save_tiny_model("llama", tmp_path)
    folder = HuggingFaceFolder(tmp_path)
    model = from_hugging_face_config(folder.config)
    weights = {**folder, fault: folder[fault].flip(0)}
    tokens = random_tokens(199, length=32)
    with torch.inference_mode():
        expected = hugging_face(input_ids=tokens).logits
    logits = reference_logits(dict(from_hugging_face(weights, model, 199)), model, tokens)
    for arithmetic in (torch.float32, torch.bfloat16):
        with pytest.raises(ConversionError, match=suspect):
            check_parity(expected, logits, arithmetic=arithmetic)


def test_smollm2(tmp_path: Path):
    """Real weights: 9 heads in 3 groups, tied embedding, BF16 on disk."""
    path = asset("smollm2-135m")
    folder = HuggingFaceFolder(path)
    model = from_hugging_face_config(folder.config)
    assert (model.num_attention_heads, model.num_query_groups, model.vocab_size) == (9, 3, 49152)
    assert model.share_embeddings_and_output_weights
    tokens = random_tokens(49152, num_samples=1, length=64)
    canonical = {name: tensor.float() for name, tensor in from_hugging_face(folder, model, 49152)}
    logits = reference_logits(canonical, model, tokens)
    check_parity(hugging_face_logits(path, tokens), logits, arithmetic=torch.float32)
