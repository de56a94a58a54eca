"""GGUF files: blocks as the library reads them, tensors in llama.cpp's order, tokenizers, and what is refused."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from megatron_7b.checkpoint import resolve_checkpoint
from megatron_7b.compression import QuantizeOptions, quantize
from megatron_7b.compression.quantization.gguf.blocks import TYPES, pack, unpack
from megatron_7b.compression.quantization.gguf.vocabulary import name_of_words
from megatron_7b.conversion import import_from_hugging_face
from megatron_7b.errors import ConfigError, PathError
from tests.conversion.tiny_models import save_tiny_model, save_tiny_tokenizer
from tests.support.assets import asset

RNG = np.random.default_rng(4)


@pytest.mark.parametrize(("kind", "bits"), [(TYPES.Q4_K, 4.5), (TYPES.Q6_K, 6.5625), (TYPES.Q8_0, 8.5)])
def test_blocks_are_read_as_they_were_meant(kind: gguf.GGMLQuantizationType, bits: float) -> None:
    values = RNG.standard_normal((6, 512)).astype(np.float32) * RNG.lognormal(size=(6, 1)).astype(np.float32)
    values[0, :256] = 0
    values[1, 7] = 40
    packed = pack(values, kind)
    assert packed.nbytes * 8 == values.size * bits
    error = np.linalg.norm(unpack(packed, kind)[2:] - values[2:]) / np.linalg.norm(values[2:])
    assert error < {4.5: 0.075, 6.5625: 0.019, 8.5: 0.006}[bits]
    assert (unpack(packed, kind)[0, :256] == 0).all()


def test_values_on_the_grid_come_back() -> None:
    steps = RNG.integers(0, 16, (4, 8, 32))
    steps[:, :, :2] = 0, 15
    values = (steps * 0.5 - 2.0).astype(np.float32).reshape(4, 256)
    np.testing.assert_allclose(unpack(pack(values, TYPES.Q4_K), TYPES.Q4_K), values, atol=4e-3)
    steps = RNG.integers(-32, 32, (4, 16, 16))
    steps[:, :, 0] = -32
    values = (steps * 0.25).astype(np.float32).reshape(4, 256)
    np.testing.assert_allclose(unpack(pack(values, TYPES.Q6_K), TYPES.Q6_K), values, rtol=2e-3)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    }
    for case in ("llama", "llama3_scaled", "qwen2_tied", "gpt2"):
        save_tiny_model(
            case,
            folder / case,
            vocab_size=310,
            **({"n_inner": None, "max_position_embeddings": 1024} if case == "gpt2" else sizes),
        )
        save_tiny_tokenizer(folder / case)
        settings = json.loads((folder / case / "tokenizer.json").read_text())
        settings["pre_tokenizer"] = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        }
        (folder / case / "tokenizer.json").write_text(json.dumps(settings))
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 60)
    return folder


@pytest.mark.parametrize("case", ["llama", "llama3_scaled", "qwen2_tied", "gpt2"])
def test_transformers_reads_the_same_model(models: Path, tmp_path: Path, case: str) -> None:
    from transformers import AutoModelForCausalLM

    output = tmp_path / "model.gguf"
    result = quantize(output, QuantizeOptions(scheme="gguf:f16"), hf=models / case)
    assert result.bytes_after == sum(int(one.n_bytes) for one in gguf.GGUFReader(output).tensors) - (
        128 if case == "llama3_scaled" else 0
    )
    if case == "llama3_scaled":  # transformers does not read these factors
        return
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    original = AutoModelForCausalLM.from_pretrained(models / case, dtype=torch.float32).eval()
    for parameter in original.parameters():
        if parameter.dim() == 2 and len(parameter) != 1024:  # learned positions stay in FP32
            parameter.data = parameter.data.half().float()
    ids = torch.randint(0, 300, (1, 20), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        torch.testing.assert_close(read(ids).logits, original(ids).logits, atol=1e-3, rtol=1e-3)


def test_a_file_of_few_bits(models: Path, tmp_path: Path) -> None:
    how = QuantizeOptions(
        scheme="gguf:q4_k_m", held_out=models / "text.txt", num_held_out=2, seq_length=32, max_loss=9.0
    )
    result = quantize(tmp_path / "a.gguf", how, hf=models / "llama")
    assert result.divergence is not None
    assert 0 < result.divergence < 5
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    types = {one.name: one.tensor_type for one in reader.tensors}
    assert types["output.weight"] == TYPES.Q6_K
    assert types["blk.0.attn_q.weight"] == TYPES.Q4_K
    assert types["blk.0.ffn_down.weight"] == TYPES.Q5_0  # rows of 96
    assert types["blk.0.attn_norm.weight"] == TYPES.F32
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert len(fields["tokenizer.ggml.tokens"]) == 310
    assert fields["tokenizer.ggml.tokens"][-1] == "[PAD309]"
    assert "messages" in fields["tokenizer.chat_template"]


def test_ways_to_cut_words() -> None:
    for name, words in (("gpt2", "gpt-2"), ("smollm2-135m", "smollm")):
        assert name_of_words(json.loads((asset(name) / "tokenizer.json").read_text())) == words
    assert name_of_words({"pre_tokenizer": {"type": "Whitespace"}}) is None


def test_windows_are_refused_before_a_checkpoint_is_written_out(tmp_path: Path) -> None:
    save_tiny_model("mistral_window", tmp_path / "hf", vocab_size=310)
    save_tiny_tokenizer(tmp_path / "hf")
    import_from_hugging_face(tmp_path / "hf", tmp_path / "c")
    checkpoint = resolve_checkpoint(tmp_path / "c")
    told: list[str] = []
    with pytest.raises(ConfigError, match=rf"{checkpoint} has a sliding window of 9 tokens.*\n.*w4a16"):
        quantize(
            tmp_path / "a.gguf",
            QuantizeOptions(scheme="gguf:q8_0"),
            checkpoint=checkpoint,
            report=lambda *what: told.append(str(what)),
        )
    assert told == []
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    del settings["sliding_window"]  # transformers takes 4096 then
    (tmp_path / "hf" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="sliding window of 4096"):
        quantize(tmp_path / "a.gguf", QuantizeOptions(scheme="gguf:q8_0"), hf=tmp_path / "hf")


def test_mistakes_are_told(models: Path, tmp_path: Path) -> None:
    for output, says in (("a", "such as .*a.gguf"), ("there.gguf", "exists")):
        (tmp_path / "there.gguf").write_text("x")
        with pytest.raises(ConfigError, match=says):
            quantize(tmp_path / output, QuantizeOptions(scheme="gguf:q8_0"), hf=models / "llama")
    with pytest.raises(ConfigError, match="block by block"):
        quantize(tmp_path / "a.gguf", QuantizeOptions(scheme="gguf:q8_0", method="gptq", calibration="x"), hf=models)
    other = tmp_path / "other"
    save_tiny_model("llama", other, vocab_size=310)
    save_tiny_tokenizer(other)
    settings = json.loads((other / "tokenizer.json").read_text())
    settings["pre_tokenizer"] = {"type": "Whitespace"}
    (other / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="not known to have"):
        quantize(tmp_path / "a.gguf", QuantizeOptions(scheme="gguf:q8_0"), hf=other)
    assert issubclass(PathError, ConfigError)
    assert not (tmp_path / "a.gguf").exists()
