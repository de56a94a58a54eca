"""Quantised folders: what transformers reads of them, what is measured, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_7b.compression import QuantizeOptions, quantize
from megatron_7b.compression.quantization.grid import round_inputs
from megatron_7b.compression.quantization.schemes import SCHEMES
from megatron_7b.conversion import import_from_hugging_face
from megatron_7b.errors import ConfigError, ConversionError, MegatronError, PathError
from tests.conversion.tiny_models import save_tiny_model, save_tiny_tokenizer
from tests.support.commands import run_command

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
IDS = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for case in ("llama", "qwen2_tied", "qwen3", "mistral_window", "qwen3_windows"):
        save_tiny_model(case, folder / case, vocab_size=300, **SHAPE)
        save_tiny_tokenizer(folder / case)
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "the",
        "lazy",
        "dog",
        "while",
        "seven",
        "wizards",
        "mix",
        "potions",
        "of",
        "every",
        "kind",
    ]
    lines = (" ".join(words[(one * k) % len(words)] for k in range(60)) for one in range(1, 60))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return folder


def options(models: Path, **changes: Any) -> QuantizeOptions:
    text = {"calibration": models / "text.jsonl", "num_samples": 12, "num_held_out": 4, "seq_length": 32}
    return QuantizeOptions(**{**text, "group_size": 32, "max_loss": 9.0, **changes})


@pytest.mark.parametrize(
    ("case", "scheme", "method"),
    [("llama", "w4a16", "gptq"), ("llama", "w8a8", "rtn"), ("llama", "fp8", "rtn"), ("qwen2_tied", "w4a16", "awq"),
     ("qwen3", "w8a16", "rtn"), ("mistral_window", "w4a16", "gptq"), ("qwen3_windows", "w8a8", "rtn"),
     ("qwen3_windows", "fp8", "rtn"), ("mistral_window", "w8a16", "rtn")],
)  # fmt: skip
def test_transformers_computes_what_was_measured(
    models: Path, tmp_path: Path, case: str, scheme: str, method: str
) -> None:
    from transformers import AutoModelForCausalLM

    groups = {} if scheme in ("w4a16", "w8a16") else {"group_size": None}
    result = quantize(tmp_path / "out", options(models, scheme=scheme, method=method, **groups), hf=models / case)
    assert result.bytes_after < result.bytes_before
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    original = AutoModelForCausalLM.from_pretrained(models / case, dtype=torch.float32).eval()
    with torch.inference_mode():
        read(IDS)  # which unpacks the weights
        for name, module in read.named_modules():
            if name.endswith("_proj"):
                original.get_submodule(name).weight.copy_(module.weight)
                if module.bias is not None:
                    original.get_submodule(name).bias.copy_(module.bias)
                if SCHEMES[scheme].rounds_inputs:
                    original.get_submodule(name).register_forward_pre_hook(
                        lambda _module, inputs: (round_inputs(inputs[0], SCHEMES[scheme]),)
                    )
            elif name.endswith("norm"):
                original.get_submodule(name).weight.copy_(module.weight)
        torch.testing.assert_close(read(IDS).logits, original(IDS).logits, atol=1e-4, rtol=1e-4)
    for key in ("sliding_window", "layer_types"):  # texts are longer than the windows, of 9 tokens
        assert getattr(read.config, key, None) == getattr(original.config, key, None)
    with torch.inference_mode():
        losses = [float(original(one[None], labels=one[None]).loss) for one in held_out(models, case)]
    assert result.perplexity_after == pytest.approx(torch.tensor(losses).mean().exp().item(), rel=1e-4)


def held_out(models: Path, case: str) -> torch.Tensor:
    from megatron_7b.compression import read_calibration
    from megatron_7b.tokenizer import load_tokenizer

    samples = read_calibration(models / "text.jsonl", load_tokenizer(models / case), 16, 32)
    return torch.tensor(samples[::4])


def test_gptq_loses_less_than_rounding_and_awq_folds_exactly(models: Path, tmp_path: Path) -> None:
    errors = {}
    for method in ("rtn", "gptq", "awq"):
        result = quantize(tmp_path / method, options(models, scheme="w4a16", method=method), hf=models / "llama")
        errors[method] = sum(one.of_output or 0 for one in result.errors)
    assert errors["gptq"] < 0.95 * errors["rtn"]
    assert errors["awq"] < errors["rtn"]


def test_what_is_ignored_stays(models: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    kept = "model.layers.1.mlp.down_proj"
    how = options(models, scheme="w4a16", ignore=("lm_head", kept), max_shard_bytes=40_000)
    result = quantize(tmp_path / "out", how, hf=models / "llama")
    assert set(result.kept) == {"lm_head", kept}
    tensors = {name: one for file in (tmp_path / "out").glob("*.safetensors") for name, one in load_file(file).items()}
    original = load_file(models / "llama" / "model.safetensors")
    assert torch.equal(tensors[f"{kept}.weight"], original[f"{kept}.weight"])
    assert "model.layers.0.mlp.down_proj.weight_packed" in tensors
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == sorted(result.kept)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"scheme": "w4a15"}, "unknown scheme 'w4a15'.*did you mean w4a16"),
        ({"group_size": 128}, "groups of 128 do not divide the 96 inputs of .*mlp.down_proj .*--group-size 32 does"),
        ({"method": "gptq", "calibration": None}, "--method gptq looks at what the model computes on text"),
        ({"scheme": "fp8", "method": "gptq", "group_size": None}, "does not apply to fp8"),
        ({"scheme": "w8a8", "group_size": 32}, "does not apply to w8a8"),
        ({"num_samples": 10_000}, "10,004 samples of 32 need"),
        ({"ignore": ("lm_head", "model.layers.9")}, "fits no matrix"),
        ({"ignore": ("lm_head", "re:(")}, "no regular expression"),
        ({"seq_length": 4096}, "the model's context is 256"),
        ({"scheme": "gguf:q4_1"}, "unknown scheme"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_anything_is_written(
    models: Path, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=f"(?s){says}"):
        quantize(tmp_path / "out", options(models, **{"scheme": "w4a16", **changes}), hf=models / "llama")
    assert list(tmp_path.iterdir()) == []


def test_mistakes_about_a_checkpoint_are_told_before_it_is_exported(models: Path, tmp_path: Path) -> None:
    save_tiny_model("mistral_window", tmp_path / "hf", vocab_size=300, **SHAPE)
    import_from_hugging_face(tmp_path / "hf", tmp_path / "c")
    before = sorted(tmp_path.iterdir())
    exports: list[str] = []
    cases: list[tuple[dict[str, Any], str]] = [
        ({"group_size": 128}, "groups of 128 do not divide the 96 inputs of model.layers.0.mlp.down_proj"),
        ({"ignore": ("model.layers.9",)}, "fits no matrix"),
        ({}, "c carries no tokenizer"),
        ({"scheme": "gguf:q8_0", "group_size": None}, "c has a sliding window of 9 tokens"),
    ]
    for changes, says in cases:
        output = tmp_path / ("out.gguf" if "scheme" in changes else "out")
        how = options(models, **{"scheme": "w4a16", **changes})
        with pytest.raises(ConfigError, match=says):
            quantize(output, how, checkpoint=tmp_path / "c", report=lambda topic, _: exports.append(topic))
    assert (exports, sorted(tmp_path.iterdir())) == ([], before)


def test_other_models_are_refused(models: Path, tmp_path: Path) -> None:
    for case, says in (("gpt2", "Conv1D"), ("mixtral", "mixture of experts"), ("bert", "expected a decoder")):
        save_tiny_model(case, tmp_path / case)
        with pytest.raises(ConfigError, match=says):
            quantize(tmp_path / "out", QuantizeOptions(scheme="w8a16"), hf=tmp_path / case)
    import_from_hugging_face(tmp_path / "mixtral", tmp_path / "of_experts")
    with pytest.raises(ConfigError, match="of_experts is a mixture of experts"):
        quantize(tmp_path / "out", QuantizeOptions(scheme="w8a16"), checkpoint=tmp_path / "of_experts")
    import_from_hugging_face(tmp_path / "gpt2", tmp_path / "c_gpt2")
    with pytest.raises(ConfigError, match="c_gpt2 is a GPT-2"):
        quantize(tmp_path / "out", QuantizeOptions(scheme="w8a16"), checkpoint=tmp_path / "c_gpt2")
    with pytest.raises(ConfigError, match="lm_head to --ignore"):
        quantize(tmp_path / "out", options(models, scheme="w4a16", ignore=()), hf=models / "qwen2_tied")
    with pytest.raises(ConfigError, match="given by --checkpoint C, or by --hf"):
        quantize(tmp_path / "out", QuantizeOptions(scheme="w8a16"))


def test_too_much_loss_is_refused_and_an_output_is_not_overwritten(models: Path, tmp_path: Path) -> None:
    how = options(models, scheme="w4a16", max_loss=0.0)
    with pytest.raises(MegatronError, match="perplexity grows from .* nothing was published"):
        quantize(tmp_path / "out", how, hf=models / "llama")
    assert list(tmp_path.iterdir()) == []
    told: list[str] = []
    quantize(
        tmp_path / "out",
        options(models, scheme="w4a16", max_loss=0.0, force=True),
        hf=models / "llama",
        report=lambda topic, message: told.append(topic),
    )
    assert told == ["warning"]
    with pytest.raises(PathError, match="is not empty"):
        quantize(tmp_path / "out", how, hf=models / "llama")
    with pytest.raises(ConversionError, match="is quantised already, by compressed-tensors"):
        quantize(tmp_path / "again", QuantizeOptions(scheme="w8a16"), hf=tmp_path / "out")


def test_the_command_prints_a_table(models: Path, tmp_path: Path) -> None:
    import_from_hugging_face(models / "llama", tmp_path / "checkpoint")
    arguments = (
        "--checkpoint",
        tmp_path / "checkpoint",
        "--scheme",
        "w8a16",
        "--held-out",
        models / "text.jsonl",
        "--seq-length",
        32,
    )
    done = run_command("compress", "quantize", *arguments, "--output", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    assert "perplexity" in done.stdout
    assert "largest error: model.layers." in done.stdout
    done = run_command("compress", "quantize", *arguments, "--output", tmp_path / "b", "--json")
    figures = json.loads(done.stdout)
    assert figures["bytes_after"] < figures["bytes_before"]
    assert figures["loss"] < 0.1
