"""Causal attention to a window of the newest tokens, at a cost that grows with the window and not with the text.

For what our kernel for CPUs does not take (runtime/cpu/attention.py): GPUs without Transformer Engine, dropout.
"""

import torch
import torch.nn.functional as functional
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

_SHORTEST_BLOCK = 64
"""Queries that are computed together at least: fewer would leave a matrix product too little to do."""


def window_of(config: TransformerConfig, layer_number: int) -> int | None:
    """Return how many tokens a layer sees, the newest included; None: all.

    Args:
        config: Whose window counts the tokens before the newest.
        layer_number: Of megatron-core, from 1.
    """
    if not is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
        return None
    assert config.window_size is not None
    return int(config.window_size[0]) + 1


def attend_within_window(
    query: Tensor, key: Tensor, value: Tensor, window: int, *, dropout: float = 0.0, scale: float | None = None
) -> Tensor:
    """Attend from each query to the newest keys up to its own.

    Queries are computed in blocks of half a window, which are rows of one batch: each sees its own keys and those of
    the two blocks before it. Queries at the beginning, which have fewer keys before them, are computed apart.

    Args:
        query: [b, n, s, d]
        key: [b, g, s_k, d], s_k >= s; the last query is at the last key.
        value: As the key.
        window: Keys that a query sees, its own included.
        dropout: Share of the probabilities that are dropped.
        scale: Factor of the scores; None: 1/sqrt(d).

    Returns:
        [b, n, s, d]
    """
    unseen = max(0, key.shape[2] - query.shape[2] - window + 1)
    key, value = key[:, :, unseen:], value[:, :, unseen:]
    s, earlier = query.shape[2], key.shape[2] - query.shape[2]
    block = max(_SHORTEST_BLOCK, -(-window // 2))
    reach = -(-(window - 1) // block) * block  # keys before a block, whole blocks of them
    first = max(0, reach - earlier)
    first += (s - first) % block
    if first >= s:
        return _attend(query, key, value, window, dropout, scale)
    parts = []
    if first:
        end = earlier + first
        parts.append(_attend(query[:, :, :first], key[:, :, :end], value[:, :, :end], window, dropout, scale))
    begin = earlier + first - reach
    queries = query[:, :, first:].unfold(2, block, block)
    keys, values = (x[:, :, begin:].unfold(2, reach + block, block) for x in (key, value))
    q, k, v = (x.permute(0, 2, 1, 4, 3).flatten(0, 1) for x in (queries, keys, values))  # [b × blocks, heads, …, d]
    context = _attend(q, k, v, window, dropout, scale)
    parts.append(context.view(len(query), -1, *context.shape[1:]).transpose(1, 2).flatten(2, 3))
    return torch.cat(parts, dim=2) if first else parts[0]


def _attend(query: Tensor, key: Tensor, value: Tensor, window: int, dropout: float, scale: float | None) -> Tensor:
    """Attend with a mask of all pairs, or none if no key is too old for a query."""
    s, s_k = query.shape[2], key.shape[2]
    mask = None
    if s_k > window or 1 < s < s_k:
        mask = torch.ones(s, s_k, dtype=torch.bool, device=query.device)
        mask = mask.tril(diagonal=s_k - s).triu(diagonal=s_k - s - window + 1)
    return functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None and s > 1,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
