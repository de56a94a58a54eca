"""A run that starts from weights has their model, whatever its preset says."""

import dataclasses
from pathlib import Path

import pytest

from megatron_7b.config import load_config, save_config
from megatron_7b.config.schema import ModelConfig, RopeScalingConfig


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The configuration of a run with another shape than every preset."""
    model = ModelConfig(num_layers=3, hidden_size=96, num_attention_heads=3, vocab_size=509, add_qkv_bias=True)
    config = dataclasses.replace(load_config("tiny_cpu"), model=model)
    save_config(config, tmp_path / "config.yaml")
    return tmp_path / "config.yaml"


def test_the_shape_comes_from_the_weights_and_the_rest_from_the_sources(saved: Path) -> None:
    preset = load_config("mini_cpu")
    config = load_config("mini_cpu", {"optimizer.lr": "1e-5"}, model_from=saved)
    assert config.model == load_config(saved).model
    assert config.data == preset.data
    assert config.optimizer == dataclasses.replace(preset.optimizer, lr=1e-5)


def test_dropout_and_kernels_stay_the_runs_own(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("model: {hidden_dropout: 0.1, transformer_impl: local, num_layers: 9}\n")
    model = load_config(tmp_path / "own.yaml", model_from=saved).model
    assert (model.hidden_dropout, model.transformer_impl, model.num_layers) == (0.1, "local", 3)


def test_what_the_preset_stretches_is_not_left_over(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "long.yaml").write_text("model: {rope_scaling: {factor: 8.0}}\n")
    assert load_config(tmp_path / "long.yaml").model.rope_scaling == RopeScalingConfig(factor=8.0)
    assert load_config(tmp_path / "long.yaml", model_from=saved).model.rope_scaling is None


def test_the_command_line_has_the_last_word(saved: Path) -> None:
    assert load_config("mini_cpu", {"model.rotary_base": 5e5}, model_from=saved).model.rotary_base == 5e5
