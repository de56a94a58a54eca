"""Four-bit bases: the same at every layout, small in memory, and trained as transformers and PEFT train them."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megatron_7b.adapter import building
from megatron_7b.checkpoint import read_config
from megatron_7b.cli.main import main
from megatron_7b.config import check_config
from megatron_7b.config.schema import RunConfig
from megatron_7b.errors import ConfigError
from tests.adapter.peft_oracle import save_adapter, saved_adapter, train_with_peft
from tests.adapter.test_peft import NUM_STEPS, tensors_of, train_further
from tests.conversion.tiny_models import save_tiny_model
from tests.support.commands import run_command
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import VOCAB_SIZE, tiny_config

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP1": (1, {}),
    "TP2 SP": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "DP2 shared": (2, {"use_distributed_optimizer": True}),
}
SHAPE = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose shards at TP2 are whole blocks, `base`, an adapter of PEFT, `peft`, and both as `checkpoint`."""
    from peft import LoraConfig

    path = tmp_path_factory.mktemp("qlora")
    save_tiny_model("llama", path / "base", vocab_size=VOCAB_SIZE, **SHAPE)
    save_adapter(path / "base", path / "peft", LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    arguments = ("--input", path / "peft", "--base", path / "base", "--output", path / "checkpoint")
    assert main(["convert", "from-hf", *map(str, arguments)]) == 0
    return path


def config_of(folder: Path, **parallel: Any) -> RunConfig:
    config, tiny = read_config(folder / "checkpoint"), tiny_config()
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, transformer_impl="local", make_vocab_size_divisible_by=8),
        adapter=dataclasses.replace(config.adapter, method="qlora"),
        training=tiny.training,
        data=tiny.data,
        optimizer=dataclasses.replace(tiny.optimizer, lr=3e-3, adam_eps=1e-4),
        parallel=dataclasses.replace(config.parallel, **parallel),
    )


def decoded_weights(config: RunConfig, checkpoint: Path) -> tuple[dict[str, NDArray[np.float32]], int, int]:
    """Entry point of a rank: what the weights of layers decode to, bytes of them, and bytes of placeholders."""
    from megatron_7b.adapter.quantized import QuantizedWeight
    from megatron_7b.checkpoint.base import find_base
    from megatron_7b.checkpoint.load import load_weights
    from megatron_7b.model.on_ranks import build_on_ranks

    model = build_on_ranks(config, "cpu", is_training=False, initialize=False, adapter=building.build_adapter(config))
    base = find_base(checkpoint)
    assert base is not None
    load_weights(base, model.chunks, may_lack=model.adapter_names)
    layers = {name: one for name, one in model.only_chunk.named_modules() if isinstance(one, QuantizedWeight)}
    held = [one.quantized for one in layers.values() if one.quantized is not None]
    assert len(held) == len(layers)
    decoded = {name: one.decoded(torch.float32).numpy() for name, one in zip(layers, held, strict=True)}
    storage = sum(one.weight.untyped_storage().nbytes() for one in layers.values())
    return decoded, sum(one.nbytes for one in held), storage


def test_parts_of_tensor_ranks_are_those_of_the_whole(folder: Path) -> None:
    ((whole, num_bytes, of_places),) = run_ranks(1, decoded_weights, config_of(folder), folder / "checkpoint")
    parts = run_ranks(2, decoded_weights, config_of(folder, tensor_model_parallel_size=2), folder / "checkpoint")
    for name, values in whole.items():
        shards = [decoded[name] for decoded, *_ in parts]
        if "linear_fc1" in name:  # each rank has some gate and some up rows
            halves = [np.split(shard, 2) for shard in shards]
            joined = np.concatenate([half[0] for half in halves] + [half[1] for half in halves])
        else:
            joined = np.concatenate(shards, axis=1 if name.endswith(("linear_proj", "linear_fc2")) else 0)
        assert np.array_equal(joined, values), name
    elements = sum(values.size for values in whole.values())
    assert num_bytes == elements // 2 + 4 * elements // 64
    assert of_places == 4 * len(whole)


def test_training_equals_that_of_transformers_and_peft(folder: Path, tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    config = config_of(folder)
    in_four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=False,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    expected = train_with_peft(
        folder / "base", folder / "peft", config, NUM_STEPS, quantization_config=in_four_bits, device_map="cpu"
    )
    for name, (size, parallel) in LAYOUTS.items():
        config = config_of(folder, **parallel)
        for results in run_ranks(size, train_further, config, folder / "checkpoint", tmp_path / name):
            for ours, theirs in zip(results, expected.results, strict=True):
                assert ours == pytest.approx(theirs, rel=1e-5), name
        tensors = tensors_of(tmp_path / name / "latest")
        for key, tensor in tensors.items():
            assert torch.allclose(tensor, expected.tensors[key], rtol=0, atol=5e-5), (name, key)
    arguments = ("--checkpoint", tmp_path / "TP1" / "latest")
    for options in ((), ("--merge",)):
        output = tmp_path / f"out{''.join(options)}"
        assert main(["convert", "to-hf", *map(str, (*arguments, "--output", output, *options))]) == 0
    assert saved_adapter(tmp_path / "out").keys() == expected.tensors.keys()
    done = run_command("generate", *arguments, "--prompt", "1 2", "--max-new-tokens", 3, "--tokenizer", "bytes")
    assert done.returncode == 0, done.stderr


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"needs? bitsandbytes, which is not installed[\s\S]*megatron-7b\[qlora\]"):
        building.build_adapter(tiny_config(adapter={"method": "qlora"}))
    with pytest.raises(ConfigError, match="does not go with adapter.method qlora"):
        check_config(
            tiny_config(
                adapter={"method": "qlora"},
                precision={"fp8": "hybrid", "params_dtype": "bf16"},
                model={"transformer_impl": "auto"},
            )
        )
