"""Random models to grow, checkpoints of them, and what ranks compute with these."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_7b.checkpoint.weights import write_weights
from megatron_7b.config import check_config
from megatron_7b.config.schema import ModelConfig, RunConfig
from megatron_7b.conversion.growing import GrowOptions
from megatron_7b.model.kinds import parameter_table
from tests.support.tiny_runs import tiny_config

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "bert", "megatron-bert", "t5", "t5-v1.0")


def random_model(architecture: str, draw: random.Random) -> ModelConfig:
    """Draw a small model that fits two tensor ranks, with a vocabulary that every layout pads."""
    width, groups = draw.choice([4, 8]), draw.choice([2, 4])
    is_llama = architecture in ("llama", "mistral", "qwen2", "qwen3")
    heads = groups * (draw.choice([1, 2, 3]) if is_llama else 1)
    is_t5 = architecture.startswith("t5")
    has_own_width = (is_llama or is_t5) and draw.random() < 0.4
    num_layers = draw.choice([1, 2, 3])
    windows: tuple[int, ...] = ()
    if architecture in ("qwen2", "qwen3") and num_layers > 1:
        windows = tuple(draw.sample([0, 1, 1][:num_layers], num_layers))
    has_windows = architecture == "mistral" or bool(windows)
    return ModelConfig(
        architecture=architecture,
        num_layers=num_layers,
        window_size=7 if has_windows else None,  # the texts of the tests are longer
        window_attn_skip_freq=windows,
        num_decoder_layers=draw.choice([None, 2]) if is_t5 else None,
        hidden_size=2 * draw.randrange(8, 20) if has_own_width else width * heads,
        ffn_hidden_size=2 * draw.randrange(8, 40),
        num_attention_heads=heads,
        num_query_groups=groups if is_llama and draw.random() < 0.8 else None,
        kv_channels=width if has_own_width else None,
        vocab_size=draw.randrange(90, 140),
        make_vocab_size_divisible_by=draw.choice([1, 8, 128]),
        max_position_embeddings=64,
        norm_epsilon=draw.choice([1e-3, 1e-5]),  # so large that a norm that forgets it is noticed
        share_embeddings_and_output_weights=draw.random() < 0.5,
        scale_output_states=is_t5 and draw.random() < 0.5,
        add_qkv_bias=architecture == "qwen2",
        qk_layernorm=architecture == "qwen3",
        num_tokentypes=2 if "bert" in architecture else 0,
        transformer_impl="local",
    )


def random_options(model: ModelConfig, draw: random.Random) -> GrowOptions:
    """Draw what a model can grow into, two tensor ranks included."""
    traits, width = model.traits, model.head_width
    if traits.kind == "encoder":
        hidden = model.hidden_size * draw.choice([1, 2, 3])
    elif traits.has_query_groups or traits.has_wide_heads:
        hidden = draw.choice([model.hidden_size, 2 * model.hidden_size, model.hidden_size + 2 * draw.randrange(1, 30)])
    else:
        hidden = model.hidden_size + 2 * width * draw.randrange(4)
    heads = groups = None
    if traits.has_query_groups:
        groups = model.query_groups * draw.choice([1, 2, 3])
        queries = model.num_attention_heads // model.query_groups
        heads = groups * draw.choice([queries, queries + 1])
    elif traits.has_wide_heads:
        heads = model.num_attention_heads * draw.choice([1, 2])
    return GrowOptions(
        num_decoder_layers=3 if traits.kind == "encoder_decoder" and draw.random() < 0.5 else None,
        num_layers=model.num_layers + (draw.randrange(4) if traits.norm_placement == "pre" else 0),
        hidden_size=hidden,
        ffn_hidden_size=model.ffn_hidden_size + 2 * draw.randrange(1, 60),
        num_attention_heads=heads,
        num_query_groups=groups,
        seed=draw.randrange(1000),
    )


def run_of(model: ModelConfig) -> RunConfig:
    """Return a run that may train a model."""
    config = replace(tiny_config(), model=model)
    check_config(config)
    return config


def write_random(
    folder: Path, model: ModelConfig, dtype: torch.dtype = torch.float32, *, run: RunConfig | None = None
) -> Path:
    """Write a checkpoint whose every parameter, norms and biases included, is random."""
    assert model.vocab_size is not None
    generator = torch.Generator().manual_seed(3)

    def tensors() -> Any:
        for name, parameter in parameter_table(model, model.vocab_size or 0).items():
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            yield name, (1 + noise if parameter.init == "ones" else noise).to(dtype)

    return write_weights(folder, tensors(), run or run_of(model))


def sharded_logits(cases: list[tuple[Path, NDArray[np.int64]]]) -> list[NDArray[np.float32]]:
    """Entry point of a tensor rank: logits [b, s, v] of checkpoints for tokens, gathered from all ranks."""
    return [_sharded_logits(folder, torch.from_numpy(tokens)).numpy() for folder, tokens in cases]


def _sharded_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    import torch.distributed as dist

    from megatron_7b.checkpoint.inference_config import inference_config
    from megatron_7b.checkpoint.open_model import opened_model
    from megatron_7b.conversion.checkpoint_logits import text_inputs

    settings = {"parallel.tensor_model_parallel_size": dist.get_world_size(), "data.seq_length": tokens.shape[1]}
    config = inference_config(folder, {**settings, "precision.params_dtype": "fp32"})
    with opened_model(folder, config) as model, torch.inference_mode():
        shards = [model.only_chunk(**text_inputs(sample, model))[0] for sample in tokens]
    own = torch.stack(shards).contiguous()
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own)
    return torch.cat(parts, dim=-1)
