"""The model as a page of plain torch: an independent reference over canonical weights.

Shares no code with the model package, megatron-core or transformers, and no cleverness: every step is written as its
paper has it, in FP32 (or whatever the weights are), without caches, fusions or parallelism.

Sources: RMSNorm arXiv:1910.07467, SwiGLU arXiv:2002.05202, rotary embedding arXiv:2104.09864 (rotate-half form),
grouped queries arXiv:2305.13245, frequency scaling: the Llama 3.1 model card's reference code.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_7b.config.schema import ModelConfig, RopeScalingConfig


def reference_logits(weights: Mapping[str, Tensor], model: ModelConfig, tokens: Tensor) -> Tensor:
    """Compute the logits of whole sequences.

    Args:
        weights: Full tensors by canonical name; embeddings may be padded.
        model: Shape of the model.
        tokens: int64 [b, s].

    Returns:
        [b, s, v], padding columns included.
    """
    hidden = weights["embedding.word_embeddings.weight"][tokens]
    cos, sin = (angles.to(hidden.dtype) for angles in rotation(model, tokens.shape[1]))
    for layer in range(model.num_layers):
        hidden = hidden + _attention(weights, layer, model, hidden, cos, sin)
        hidden = hidden + _mlp(weights, f"decoder.layers.{layer}", model, hidden)
    hidden = rms_norm(hidden, weights["decoder.final_norm.weight"], model.norm_epsilon)
    tied = model.share_embeddings_and_output_weights
    output = weights["embedding.word_embeddings.weight" if tied else "output_layer.weight"]
    return hidden @ output.T


def reference_loss(weights: Mapping[str, Tensor], model: ModelConfig, tokens: Tensor, labels: Tensor) -> Tensor:
    """Compute the mean cross entropy per token over the true vocabulary, tokens and labels [b, s]."""
    assert model.vocab_size is not None
    logits = reference_logits(weights, model, tokens)[..., : model.vocab_size].float()
    return -logits.log_softmax(-1).gather(-1, labels[..., None]).mean()


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Divide by the root mean square of the last dimension, then scale."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


def rotation(model: ModelConfig, length: int) -> tuple[Tensor, Tensor]:
    """Return FP64 cosines and sines [s, d / 2] of the angle by which each pair of channels turns at each position."""
    width = model.kv_channels or model.hidden_size // model.num_attention_heads
    frequencies = [model.rotary_base ** (-2 * pair / width) for pair in range(width // 2)]
    if model.rope_scaling is not None:
        frequencies = [_slowed(frequency, model.rope_scaling) for frequency in frequencies]
    angles = torch.outer(torch.arange(length, dtype=torch.float64), torch.tensor(frequencies, dtype=torch.float64))
    return angles.cos(), angles.sin()


def _slowed(frequency: float, scaling: RopeScalingConfig) -> float:
    """Leave high frequencies, divide low ones by the factor, and blend in between."""
    turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    if turns > scaling.high_freq_factor:
        return frequency
    if turns < scaling.low_freq_factor:
        return frequency / scaling.factor
    share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return (1 - share) * frequency / scaling.factor + share * frequency


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel pairs (i, i + d / 2) of [b, s, d] by their angles."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _attention(
    weights: Mapping[str, Tensor], layer: int, model: ModelConfig, hidden: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    name = f"decoder.layers.{layer}"
    groups = model.num_query_groups or model.num_attention_heads
    width = model.kv_channels or model.hidden_size // model.num_attention_heads
    queries_per_group = model.num_attention_heads // groups
    x = rms_norm(hidden, weights[f"{name}.input_layernorm.weight"], model.norm_epsilon)
    projected = x @ weights[f"{name}.self_attention.linear_qkv.weight"].T
    if model.add_qkv_bias:
        projected = projected + weights[f"{name}.self_attention.linear_qkv.bias"]
    # Rows per query group: its query heads, its key head, its value head. [b, s, g, heads in group, d]
    projected = projected.unflatten(-1, (groups, queries_per_group + 2, width))
    positions = torch.arange(hidden.shape[1])
    distances = positions[:, None] - positions  # from a query back to a key
    window = model.layer_windows[layer] or len(positions)
    hidden_keys = (distances < 0) | (distances >= window)
    heads = []
    for group in range(groups):
        key, value = projected[:, :, group, -2], projected[:, :, group, -1]
        if model.qk_layernorm:
            key = rms_norm(key, weights[f"{name}.self_attention.k_layernorm.weight"], model.norm_epsilon)
        key = _rotate(key, cos, sin)
        for head in range(queries_per_group):
            query = projected[:, :, group, head]
            if model.qk_layernorm:
                query = rms_norm(query, weights[f"{name}.self_attention.q_layernorm.weight"], model.norm_epsilon)
            scores = _rotate(query, cos, sin) @ key.transpose(-1, -2) / math.sqrt(width)
            heads.append(scores.masked_fill(hidden_keys, -math.inf).softmax(-1) @ value)
    return torch.cat(heads, dim=-1) @ weights[f"{name}.self_attention.linear_proj.weight"].T


def _mlp(weights: Mapping[str, Tensor], name: str, model: ModelConfig, hidden: Tensor) -> Tensor:
    x = rms_norm(hidden, weights[f"{name}.pre_mlp_layernorm.weight"], model.norm_epsilon)
    gate, up = (x @ weights[f"{name}.mlp.linear_fc1.weight"].T).chunk(2, dim=-1)
    return (gate * gate.sigmoid() * up) @ weights[f"{name}.mlp.linear_fc2.weight"].T
