"""The layers of both stacks, with the norms before attention and MLP."""

import functools
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import (
    CrossAttention,
    CrossAttentionSubmodules,
    SelfAttention,
    SelfAttentionSubmodules,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor
from torch.nn import functional

from megatron_7b.model.kernels import Kernels

FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
"""Where Transformer Engine has a norm within the linear layer that follows it."""


class BiasedAttention(MegatronModule):
    """Core attention of both implementations: torch's, which takes a bias of scores and has a gradient for it.

    What may be seen is part of the bias or, without one, the mask.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,  # noqa: ARG002 - this and the next are part of megatron-core's interface
        attention_type: str,  # noqa: ARG002
        softmax_scale: float | None = None,
        **_unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,  # noqa: ARG002
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend to what is not hidden.

        Args:
            query: [s, b, n/tp, d].
            key: [s_k, b, n/tp, d].
            value: As the key.
            attention_mask: True where a key is seen, broadcast to [b, n/tp, s, s_k]; None: everywhere. Not used if
                there is a bias.
            attn_mask_type: Unused.
            attention_bias: Added to the scores, broadcast to [b, n/tp, s, s_k], very low where a key is hidden.
            packed_seq_params: None.

        Returns:
            [s, b, n/tp × d].
        """
        assert packed_seq_params is None
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, heads, s, d]
        context = functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=attention_mask if attention_bias is None else attention_bias,
            dropout_p=self.config.attention_dropout if self.training else 0.0,
            scale=self.softmax_scale,
        )
        return context.permute(2, 0, 1, 3).flatten(2)


def build_block_spec(kernels: Kernels, *, num_layers: int, is_decoder: bool) -> TransformerBlockSubmodules:
    """Return the spec of a stack and of the norm after its last layer."""
    cross_attention = ModuleSpec(
        module=CrossAttention,
        params={"attn_mask_type": AttnMaskType.padding},
        submodules=CrossAttentionSubmodules(
            linear_q=kernels.column_linear,
            linear_kv=kernels.column_linear,
            core_attention=BiasedAttention,
            linear_proj=kernels.row_linear,
        ),
    )
    only_in_decoder: dict[str, Any] = {
        "pre_cross_attn_layernorm": kernels.norm,
        "cross_attention": cross_attention,
        "cross_attn_bda": get_bias_dropout_add,
    }
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=kernels.norm_before_linear,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.arbitrary},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=kernels.norm_linear, core_attention=BiasedAttention, linear_proj=kernels.row_linear
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            **(only_in_decoder if is_decoder else {}),
            pre_mlp_layernorm=kernels.norm_before_linear,
            mlp=functools.partial(
                MLP.as_mlp_submodule,
                submodules=MLPSubmodules(linear_fc1=kernels.norm_linear, linear_fc2=kernels.row_linear),
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=dict(FUSED_NORMS),
        ),
    )
    return TransformerBlockSubmodules([layer] * num_layers, layer_norm=kernels.norm)
