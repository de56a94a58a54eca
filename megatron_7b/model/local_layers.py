"""Torch-native kernels for the layer spec that needs neither Transformer Engine nor apex."""

from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as functional
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_7b.errors import ConfigError
from megatron_7b.model.context_parallel import gather_sequence, spans
from megatron_7b.model.windowed_attention import attend_within_window, window_of
from megatron_7b.runtime.cpu import attention as cpu_attention
from megatron_7b.runtime.cpu import kernels as cpu_kernels


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm over the last dimension that works with sequence parallelism.

    Under sequence parallelism each tensor rank normalises its own part of the sequence, so the gradients of the shared
    weight must be summed over tensor ranks; megatron-core looks for the attribute `sequence_parallel` on the weight.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., h]."""
        if cpu_kernels.is_supported(x, self.weight) and self.eps is not None:
            return cpu_kernels.rms_norm(x, self.weight, self.eps)
        return super().forward(x)


class LayerNorm(torch.nn.LayerNorm):
    """LayerNorm over the last dimension that works with sequence parallelism, for the reason that `RMSNorm` gives."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in (self.weight, self.bias):
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class SwiGLU(torch.nn.Module):
    """The gated activation between the two linear layers of an MLP: one pass forward and one back, on a CPU."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        assert config.gated_linear_unit
        assert config.activation_func is functional.silu

    def forward(self, x: Tensor) -> Tensor:
        """Return silu(gate) × up, where [..., 2f] holds gate and up side by side."""
        if cpu_kernels.is_supported(x):
            return cpu_kernels.swiglu(x)
        gate, up = x.chunk(2, dim=-1)
        return functional.silu(gate) * up


class ScaledDotProductAttention(MegatronModule):
    """Core attention by our kernel for CPUs, or torch's function: no s×s matrix is kept."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,  # noqa: ARG002 - this and the next are part of megatron-core's interface
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,  # noqa: ARG002
        pg_collection: ProcessGroupCollection | None = None,
        **_unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.window = window_of(config, layer_number)
        self.is_causal = attn_mask_type == AttnMaskType.causal
        self.softmax_scale = softmax_scale
        self.context_group = None if config.context_parallel_size == 1 else _context_group(pg_collection)
        self.attention_dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,  # noqa: ARG002
        attn_mask_type: AttnMaskType | None = None,  # noqa: ARG002
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend to all earlier positions, in a layer with a window to the newest of them, or in an encoder to all.

        Args:
            query: [s, b, n/tp, d]; [t, n/tp, d] where documents are packed into t tokens; [s/cp, b, n/tp, d], like the
                others, under context parallelism.
            key: [s_k, b, g/tp, d] or [t, g/tp, d]; s_k > s where a key-value cache holds earlier positions.
            value: As the key.
            attention_mask: Unused: the mask follows from the kind of model, and padding is a document of its own.
            attn_mask_type: Unused.
            attention_bias: Must be None.
            packed_seq_params: Where documents begin, in megatron-core's thd format: none sees another. Under context
                parallelism in the format bshd, where they begin among the b × s tokens.

        Returns:
            [s, b, n/tp × d], or [t, n/tp, d].

        Raises:
            ConfigError: A bias or another packed format is asked for, which this kernel cannot honour.

        Collective: the context-parallel group.
        """
        wanted = "thd" if self.context_group is None else "bshd"
        if attention_bias is not None or (packed_seq_params is not None and packed_seq_params.qkv_format != wanted):
            raise ConfigError(
                f"the torch-native attention honours neither a bias nor a packed format other than {wanted}"
            )
        if self.context_group is not None:
            return self._attend_over_ranks(query, key, value, packed_seq_params, self.context_group)
        if packed_seq_params is not None:
            return self._attend_within_documents(query, key, value, packed_seq_params)
        context = self._attend(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))
        return context.permute(2, 0, 1, 3).flatten(2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from queries [b, n/tp, s, d], of which the last is at the last of the keys [b, g/tp, s_k, d]."""
        dropout, s, s_k = self.attention_dropout if self.training else 0.0, q.shape[2], k.shape[2]
        by_position = [x.permute(2, 0, 1, 3) for x in (q, k, v)]
        if dropout == 0.0 and cpu_attention.is_supported(*by_position, causal=self.is_causal, scale=self.softmax_scale):
            context = cpu_attention.attention(
                *by_position, causal=self.is_causal, window=self.window, scale=self.softmax_scale
            )
            return context.permute(1, 2, 0, 3)
        if self.window is not None and s_k > self.window:
            return attend_within_window(q, k, v, self.window, dropout=dropout, scale=self.softmax_scale)
        mask = None
        if self.is_causal and 1 < s < s_k:
            # is_causal aligns the first query with the first key; here the last ones belong together.
            mask = torch.ones(s, s_k, dtype=torch.bool, device=q.device).tril(diagonal=s_k - s)
        return functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=self.is_causal and mask is None and s > 1,
            scale=self.softmax_scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )

    def _attend_over_ranks(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        packed: PackedSeqParams | None,
        group: dist.ProcessGroup,
    ) -> Tensor:
        """Attend from this rank's queries to the keys of all ranks.

        Keys and values of grouped queries are small beside activations, so all of them are gathered at once.
        """
        assert self.is_causal
        keys, values = gather_sequence(torch.cat((key, value), dim=-1), group).permute(1, 2, 0, 3).chunk(2, dim=-1)
        queries = query.permute(1, 2, 0, 3)  # [b, n/tp, s/cp, d]
        context = torch.empty_like(queries)
        documents = None if packed is None else packed.cu_seqlens_q.tolist()
        for span in spans(group.rank(), group.size(), keys.shape[2], keys.shape[0], documents):
            q, k, v = queries[span.rows, :, span.queries], *(x[span.rows, :, span.keys] for x in (keys, values))
            context[span.rows, :, span.queries] = self._attend(q, k, v)
        return context.permute(2, 0, 1, 3).flatten(2)

    def _attend_within_documents(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams) -> Tensor:
        """Attend document by document: the cost is the sum of their squared lengths, and no mask is needed."""
        cumulative = packed.cu_seqlens_q.tolist()
        lengths = [end - begin for begin, end in pairwise(cumulative)]
        documents = zip(*(torch.split(x.transpose(0, 1), lengths, dim=1) for x in (query, key, value)), strict=True)
        contexts = [self._attend(q[None], k[None], v[None]) for q, k, v in documents]  # [heads, length, d]
        return torch.cat(contexts, dim=2)[0].transpose(0, 1)


def _context_group(groups: ProcessGroupCollection | None) -> dist.ProcessGroup:
    assert groups is not None, "megatron-core hands its groups to core attention"
    group: dist.ProcessGroup = groups.cp
    return group
