"""One token of each text through a decoder's layers, on a CPU: as few calls as there are operations.

For few rows a layer is over as soon as its weights have been read, and what megatron-core's modules do around each
product would take as long again. Layers that are not made of torch-native parts (adapters, four-bit weights, experts)
go the general way.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megatron_7b.generation.cache import KeyValueCache
from megatron_7b.model.kinds.decoder.network import LanguageModel
from megatron_7b.model.local_layers import LayerNorm, RMSNorm, SwiGLU
from megatron_7b.model.windowed_attention import window_of
from megatron_7b.runtime.cpu import kernels


class TokenDecoder:
    """The layers of this rank's stage, for one token of each row.

    Args:
        model: This rank's only chunk, of which `can_decode` is true.
        cache: Of the keys and values.
    """

    def __init__(self, model: LanguageModel, cache: KeyValueCache) -> None:
        self._cache = cache
        group = model.pg_collection.tp
        self._group: dist.ProcessGroup | None = group if group.size() > 1 else None
        self._blocks: list[Callable[[Tensor, _Step], Tensor]] = []
        attentions = 0
        for layer in model.decoder.layers:
            if isinstance(layer.self_attention, SelfAttention):
                self._blocks.append(_Attention(layer, attentions, self._sum))
                attentions += 1
            else:
                self._blocks.append(_FeedForward(layer, self._sum))
        self._final_norm = model.decoder.final_norm if model.post_process else None

    def run(self, hidden: Tensor, positions: Sequence[int], angles: Tensor | None) -> Tensor:
        """Run the layers.

        Args:
            hidden: [b, h]; overwritten.
            positions: Where the tokens stand, [b], for which there is room.
            angles: FP32 angles of these positions, [b, r] with equal halves; None: nothing is turned.

        Returns:
            [b, h], after the final norm on the last stage.

        Collective: the tensor-parallel group.
        """
        half = hidden.new_empty(len(positions), 0, dtype=torch.float32)
        if angles is not None:
            half = angles[:, : angles.shape[-1] // 2].float()
        step = _Step(self._cache, positions, half.cos().contiguous(), half.sin().contiguous())
        for block in self._blocks:
            hidden += block(hidden, step)
        return hidden if self._final_norm is None else _normalized(hidden, self._final_norm)

    def _sum(self, partial: Tensor, linear: RowParallelLinear) -> Tensor:
        """Add up what tensor ranks have of the output of a layer, then its bias."""
        if self._group is not None:
            dist.all_reduce(partial, group=self._group)
        return partial if linear.bias is None else partial.add_(linear.bias)


class _Step:
    """What the layers share in one step."""

    def __init__(self, cache: KeyValueCache, positions: Sequence[int], cosine: Tensor, sine: Tensor) -> None:
        self.cache = cache
        self.positions = torch.tensor(positions)
        self.cosine = cosine
        self.sine = sine
        self._starts = positions

    def views(self, window: int | None) -> list[tuple[slice, int]]:
        """Return which rows see the cache from the same position on, and from which.

        Args:
            window: Keys that a query sees, its own included; None: all.
        """
        firsts = [0 if window is None else max(0, start - window + 1) for start in self._starts]
        if min(firsts) == max(firsts):
            return [(slice(len(firsts)), firsts[0])]
        return [(slice(row, row + 1), first) for row, first in enumerate(firsts)]


type _Sum = Callable[[Tensor, RowParallelLinear], Tensor]


class _Attention:
    """What an attention layer adds to the residual stream."""

    def __init__(self, layer: TransformerLayer, number: int, total: _Sum) -> None:
        attention = layer.self_attention
        self._norm, self._attention, self._number, self._sum = layer.input_layernorm, attention, number, total
        self._groups = attention.num_query_groups_per_partition
        self._queries = attention.num_attention_heads_per_partition // self._groups
        self._width = attention.hidden_size_per_attention_head
        scale = attention.config.softmax_scale
        self._scale = 1.0 / math.sqrt(self._width) if scale is None else float(scale)
        self._window = window_of(attention.config, attention.layer_number)

    def __call__(self, hidden: Tensor, step: _Step) -> Tensor:
        attention, n, d = self._attention, self._queries, self._width
        mixed = _linear(_normalized(hidden, self._norm), attention.linear_qkv)
        heads = mixed.view(len(hidden), self._groups, n + 2, d)
        query, key = heads[:, :, :n], heads[:, :, n]
        if attention.q_layernorm is not None:
            query, key = _normalized(query, attention.q_layernorm), _normalized(key, attention.k_layernorm)
        keys, values = step.cache.blocks(self._number)
        contexts = [
            kernels.decode_attention(
                query[rows], key[rows], heads[rows, :, n + 1], keys[rows, :, first:], values[rows, :, first:],
                step.cosine[rows], step.sine[rows], step.positions[rows] - first, self._scale,
            )
            for rows, first in step.views(self._window)
        ]  # fmt: skip
        context = contexts[0] if len(contexts) == 1 else torch.cat(contexts)
        return self._sum(kernels.product(context, attention.linear_proj.weight), attention.linear_proj)


class _FeedForward:
    """What an MLP layer adds to the residual stream."""

    def __init__(self, layer: MLPLayer, total: _Sum) -> None:
        self._norm, self._mlp, self._sum = layer.pre_mlp_layernorm, layer.mlp, total
        # A gated activation that is not fused does not occur in decoders.
        self._activation: Callable[[Tensor], Tensor] = layer.mlp.activation_func

    def __call__(self, hidden: Tensor, _step: _Step) -> Tensor:
        inner = _linear(_normalized(hidden, self._norm), self._mlp.linear_fc1)
        return self._sum(kernels.product(self._activation(inner), self._mlp.linear_fc2.weight), self._mlp.linear_fc2)


def can_decode(model: LanguageModel) -> bool:
    """Return whether all layers are made of what a `TokenDecoder` knows."""
    parameters = list(model.decoder.parameters())
    return (
        bool(parameters)
        and kernels.is_supported(*parameters)
        and all(parameter.is_contiguous() for parameter in parameters)
        and all(_is_known(layer) for layer in model.decoder.layers)
    )


def _is_known(layer: nn.Module) -> bool:
    if isinstance(layer, TransformerLayer) and isinstance(layer.self_attention, SelfAttention):
        attention = layer.self_attention
        norms = [layer.input_layernorm, *(x for x in (attention.q_layernorm, attention.k_layernorm) if x is not None)]
        is_narrow = attention.hidden_size_per_attention_head <= kernels.WIDEST_HEAD
        return is_narrow and _are_plain(attention.linear_qkv, attention.linear_proj, norms)
    if isinstance(layer, MLPLayer) and type(layer.mlp) is MLP:
        mlp, config = layer.mlp, layer.config
        is_fused = isinstance(mlp.activation_func, SwiGLU) or not config.gated_linear_unit
        return is_fused and _are_plain(mlp.linear_fc1, mlp.linear_fc2, [layer.pre_mlp_layernorm])
    return False


def _are_plain(first: nn.Module, second: nn.Module, norms: Sequence[nn.Module]) -> bool:
    """Return whether these are the classes themselves: what is derived from them may compute something else."""
    linears = type(first) is ColumnParallelLinear and type(second) is RowParallelLinear
    return linears and all(type(norm) in (RMSNorm, LayerNorm) for norm in norms)


def _normalized(x: Tensor, norm: Any) -> Tensor:
    normalized: Tensor = norm(x)
    return normalized


def _linear(x: Tensor, linear: ColumnParallelLinear) -> Tensor:
    return kernels.product(x, linear.weight, linear.bias)
