"""The layers of a decoder, as megatron-core's hybrid stack takes them."""

import functools
from collections.abc import Sequence

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from megatron_7b.config.schema import ModelConfig
from megatron_7b.model.experts import Experts
from megatron_7b.model.kernels import Kernels
from megatron_7b.model.kinds.decoder.parameters import SYMBOLS_PER_LAYER


def build_stack_spec(kernels: Kernels, *, qk_layernorm: bool) -> ModuleSpec:
    """Return the spec of megatron-core's HybridStack for decoder layers: `*` attention, `-` MLP, `E` experts."""
    qk_norm = kernels.norm if qk_layernorm else None
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=kernels.norm_linear,
            core_attention=kernels.attention,
            linear_proj=kernels.row_linear,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    # The activation is used where TransformerConfig.use_te_activation_func asks for it.
    mlp = functools.partial(
        MLP.as_mlp_submodule,
        submodules=MLPSubmodules(
            linear_fc1=kernels.norm_linear, linear_fc2=kernels.row_linear, activation_func=kernels.activation
        ),
    )
    expert = MLPSubmodules(
        linear_fc1=kernels.column_linear, linear_fc2=kernels.row_linear, activation_func=kernels.activation
    )
    experts = functools.partial(
        MoELayer, submodules=MoESubmodules(experts=functools.partial(Experts, submodules=expert))
    )
    return ModuleSpec(
        module=HybridStack,
        submodules=HybridStackSubmodules(
            attention_layer=ModuleSpec(
                module=TransformerLayer,
                submodules=TransformerLayerSubmodules(
                    self_attention=attention,
                    self_attn_bda=get_bias_dropout_add,
                    sharded_state_dict_keys_map={"self_attention.linear_qkv.layer_norm_": "input_layernorm."},
                    input_layernorm=kernels.norm_before_linear,
                ),
            ),
            mlp_layer=ModuleSpec(
                module=MLPLayer,
                submodules=TransformerLayerSubmodules(
                    mlp=mlp,
                    mlp_bda=get_bias_dropout_add,
                    sharded_state_dict_keys_map={"mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm."},
                    pre_mlp_layernorm=kernels.norm_before_linear,
                ),
            ),
            moe_layer=ModuleSpec(
                module=MoETransformerLayer,
                submodules=TransformerLayerSubmodules(
                    mlp=experts,
                    mlp_bda=get_bias_dropout_add,
                    pre_mlp_layernorm=kernels.norm,
                ),
            ),
        ),
    )


def hybrid_layer_pattern(model: ModelConfig, segments: Sequence[int]) -> str:
    """Return megatron-core's pattern: `*-` or `*E` per transformer layer, `|` between the pipeline segments.

    Args:
        model: Shape.
        segments: Layers of each pipeline stage, in the order of the model.
    """
    layer = "*-" if model.num_moe_experts is None else "*E"
    assert len(layer) == SYMBOLS_PER_LAYER
    assert sum(segments) == model.num_layers
    return "|".join(layer * num_layers for num_layers in segments)
