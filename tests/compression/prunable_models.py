"""Random models with something planted that nobody would miss, and what ranks measure of them."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_7b.checkpoint import Companions
from megatron_7b.checkpoint.weights import write_weights
from megatron_7b.compression.pruning.samples import TextSamples
from megatron_7b.compression.pruning.scores import Scores
from megatron_7b.config.schema import ModelConfig
from megatron_7b.conversion.growing.axes import find_axes
from megatron_7b.model.kinds import parameter_table
from tests.conversion.growing_models import run_of

VOCAB_SIZE = 300
LLAMA = ModelConfig(
    num_layers=4, hidden_size=32, ffn_hidden_size=48, num_attention_heads=8, num_query_groups=4, kv_channels=6,
    vocab_size=VOCAB_SIZE, max_position_embeddings=64, norm_epsilon=1e-2, share_embeddings_and_output_weights=True,
    transformer_impl="local",
)  # fmt: skip
MODELS = {
    "llama": LLAMA,
    "qwen2": replace(LLAMA, architecture="qwen2", add_qkv_bias=True, share_embeddings_and_output_weights=False),
    "qwen3": replace(LLAMA, architecture="qwen3", qk_layernorm=True, norm_epsilon=1e-6),
    "gpt2": replace(LLAMA, architecture="gpt2", num_attention_heads=4, num_query_groups=None, kv_channels=None),
}
SILENT_LAYER, SILENT_CHANNELS = 2, (3, 9, 10, 15, 16, 21, 30, 31)


def random_weights(model: ModelConfig) -> dict[str, Tensor]:
    """Return weights of which every one, norms and biases included, is random."""
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for name, row in parameter_table(model, VOCAB_SIZE).items():
        noise = 0.2 * torch.randn(row.shape, generator=generator)
        weights[name] = 1 + noise if row.init == "ones" else noise
    return weights


def plant(model: ModelConfig, weights: dict[str, Tensor]) -> None:
    """Silence a layer, eight channels, and in each layer other neurons (half of them) and another group of heads."""
    draw = random.Random(1)
    _silence_channels(model, weights)
    queries = model.num_attention_heads // model.query_groups
    for layer in range(model.num_layers):
        units = draw.sample(range(model.ffn_hidden_size), model.ffn_hidden_size // 2)
        value = (draw.randrange(model.query_groups) * (queries + 2) + queries + 1) * model.head_width
        values = list(range(value, value + model.head_width))
        everything = list(range(model.hidden_size)) if layer == SILENT_LAYER else []
        for name, rows in (
            ("mlp.linear_fc1", units),
            ("self_attention.linear_qkv", values),
            ("self_attention.linear_proj", everything),
            ("mlp.linear_fc2", everything),
        ):
            for part in ("weight", "bias"):
                if (tensor := weights.get(f"decoder.layers.{layer}.{name}.{part}")) is not None:
                    tensor[rows] = 0


def _silence_channels(model: ModelConfig, weights: dict[str, Tensor]) -> None:
    """Have nothing written into channels; LayerNorm does not see those that are as large as the others on average."""
    axes, is_rms = find_axes(model, VOCAB_SIZE), model.traits.normalization == "RMSNorm"
    silent = torch.tensor(SILENT_CHANNELS)
    loud = torch.tensor([channel for channel in range(model.hidden_size) if channel not in SILENT_CHANNELS])
    for name, tensor in weights.items():
        for dim, axis in enumerate(axes[name]):
            if axis == "written":
                mean = tensor.index_select(dim, loud).mean(dim, keepdim=True)
                written = tensor.index_select(dim, silent)
                tensor.index_copy_(dim, silent, torch.zeros_like(written) + (0.0 if is_rms else mean))
            elif axis == "shift":
                tensor[silent] = 0


def write_model(folder: Path, model: ModelConfig, weights: dict[str, Tensor], tokenizer: Path) -> Path:
    """Write a checkpoint with a tokenizer."""
    return write_weights(folder, weights.items(), run_of(model), companions=Companions(tokenizer=tokenizer))


def write_text(file: Path, documents: int = 60) -> Path:
    """Write text that no two samples share."""
    draw = random.Random(5)
    words = ("we", "hold", "these", "truths", "to", "be", "self", "evident", "that", "all", "men", "are", "equal")
    texts = (" ".join(draw.choices(words, k=60)) for _ in range(documents))
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return file


def measured(folder: Path, layout: dict[str, object], samples: list[list[int]]) -> Scores:
    """Entry point of a rank: the scores of a checkpoint at a layout."""
    from megatron_7b.checkpoint.inference_config import inference_config
    from megatron_7b.checkpoint.open_model import opened_model
    from megatron_7b.compression.pruning.measuring import measure_scores

    text = TextSamples(samples)
    settings = {f"parallel.{name}": value for name, value in layout.items()}
    config = inference_config(folder, {**settings, "data.seq_length": text.seq_length})
    with opened_model(folder, config) as model:
        return measure_scores(model, text)


def measured_inputs(
    folder: Path, layout: dict[str, object], samples: list[list[int]]
) -> dict[str, NDArray[np.float32]]:
    """Entry point of a rank: sums over the inputs of the matrices of two layers at a layout."""
    from megatron_7b.checkpoint.inference_config import inference_config
    from megatron_7b.checkpoint.open_model import opened_model
    from megatron_7b.compression.pruning.inputs import measure_inputs

    text = TextSamples(samples)
    settings = {f"parallel.{name}": value for name, value in layout.items()}
    config = inference_config(folder, {**settings, "data.seq_length": text.seq_length})
    with opened_model(folder, config) as model:
        return {name: gram.numpy() for name, gram in measure_inputs(model, text, [1, 2]).items()}
