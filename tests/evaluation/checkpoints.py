"""Checkpoints for evaluation, and what ranks do with them."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_7b.checkpoint import Companions
from megatron_7b.config.schema import ModelConfig, RunConfig
from megatron_7b.model.kinds import parameter_table
from tests.support.tiny_runs import VOCAB_SIZE, tiny_config

SEQ_LENGTH = 16


def tiny_model() -> ModelConfig:
    """Four layers with grouped queries and norms on queries and keys."""
    return tiny_config(model={"architecture": "qwen3", "qk_layernorm": True}).model


def random_weights(model: ModelConfig, seed: int = 3) -> dict[str, torch.Tensor]:
    """Whole parameters by canonical name, far from their usual initial values."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(parameter.shape, generator=generator) * 0.2 + (1.0 if "norm" in name else 0.0)
        for name, parameter in parameter_table(model, VOCAB_SIZE).items()
    }


def write_tiny_checkpoint(folder: Path) -> Path:
    """Entry point of a rank: write `random_weights` as a checkpoint."""
    from megatron_7b.checkpoint.weights import write_weights

    model = dataclasses.replace(tiny_model(), vocab_size=VOCAB_SIZE)
    config = tiny_config(data={"seq_length": SEQ_LENGTH})
    return write_weights(folder, random_weights(model).items(), dataclasses.replace(config, model=model))


def write_smollm2_checkpoint(folder: Path, asset: Path) -> Path:
    """Entry point of a rank: convert SmolLM2's Hugging Face folder to a checkpoint."""
    from megatron_7b.checkpoint.weights import write_weights
    from megatron_7b.conversion.folder_reader import HuggingFaceFolder
    from megatron_7b.conversion.hf_config import from_hugging_face_config
    from megatron_7b.conversion.weights import from_hugging_face

    source = HuggingFaceFolder(asset)
    model = from_hugging_face_config(source.config)
    assert model.vocab_size is not None
    weights = from_hugging_face(source, model, model.vocab_size)
    return write_weights(folder, weights, RunConfig(model=model), companions=Companions(tokenizer=asset))


def loss_of(
    checkpoint: Path, prefix: str, overrides: Mapping[str, object], max_samples: int | None = None
) -> tuple[float, int, list[int]]:
    """Entry point of a rank: (loss, tokens, windows done at each report)."""
    from megatron_7b.checkpoint.inference_config import inference_config
    from megatron_7b.checkpoint.open_model import opened_model
    from megatron_7b.evaluation.corpus import open_corpus
    from megatron_7b.evaluation.corpus_loss import measure_loss

    config = inference_config(checkpoint, {"runtime.num_threads": 1, **overrides})
    dataset = open_corpus(prefix, checkpoint, config)
    reports: list[int] = []
    with opened_model(checkpoint, config) as model:
        result = measure_loss(
            model, dataset, max_samples=max_samples, report=lambda progress: reports.append(progress.windows)
        )
    return result.loss, result.tokens, reports
