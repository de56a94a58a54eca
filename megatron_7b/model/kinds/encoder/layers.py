"""The layers of an encoder, with the norms before attention and MLP (Megatron) or after them (BERT)."""

import functools
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megatron_7b.model.kernels import Kernels


class PostNormLayer(TransformerLayer):
    """megatron-core's layer with each norm after what attention or MLP has been added to, as Vaswani et al. have it."""

    def __init__(self, *args: Any, norm: type, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        width, epsilon = self.config.hidden_size, self.config.layernorm_epsilon
        self.post_attention_layernorm = norm(config=self.config, hidden_size=width, eps=epsilon)
        self.post_mlp_layernorm = norm(config=self.config, hidden_size=width, eps=epsilon)

    def _forward_attention(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        hidden, context = super()._forward_attention(*args, **kwargs)
        return self.post_attention_layernorm(hidden), context

    def _forward_mlp(self, *args: Any, **kwargs: Any) -> Tensor:
        hidden: Tensor = self.post_mlp_layernorm(super()._forward_mlp(*args, **kwargs))
        return hidden


def build_block_spec(kernels: Kernels, *, num_layers: int, is_post_norm: bool) -> TransformerBlockSubmodules:
    """Return the spec of the layers of one pipeline stage, and of the norm after the last of all."""
    first_linear = kernels.column_linear if is_post_norm else kernels.norm_linear
    norm = IdentityOp if is_post_norm else kernels.norm_before_linear
    layer = ModuleSpec(
        module=PostNormLayer if is_post_norm else TransformerLayer,
        params={"norm": kernels.norm} if is_post_norm else {},
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.padding},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=first_linear, core_attention=kernels.attention, linear_proj=kernels.row_linear
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=functools.partial(
                MLP.as_mlp_submodule,
                submodules=MLPSubmodules(linear_fc1=first_linear, linear_fc2=kernels.row_linear),
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={
                "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
                "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
            },
        ),
    )
    return TransformerBlockSubmodules([layer] * num_layers, layer_norm=None if is_post_norm else kernels.norm)
