"""Decoders with pre-normalisation: RMSNorm, gated MLP, rotary positions, grouped-query attention: Llama, Qwen."""

import re
from collections.abc import Iterator

from megatron_7b.config.schema import ModelConfig
from megatron_7b.model.parameters import Arrangement, InitKind, Parameter, Shape, expand_braces

SYMBOLS_PER_LAYER = 2
"""megatron-core's hybrid pattern counts attention and MLP of a layer separately: layer i is its 2i and 2i + 1."""

# Transformer Engine fuses a norm into the linear layer that follows it.
_FUSED_NORMS = (
    (".self_attention.linear_qkv.layer_norm_weight", ".input_layernorm.weight"),
    (".mlp.linear_fc1.layer_norm_weight", ".pre_mlp_layernorm.weight"),
)


def parameters(model: ModelConfig, vocab_size: int) -> Iterator[Parameter]:
    """Yield every parameter in the order of the forward pass.

    Args:
        model: The shape of the model.
        vocab_size: Rows of the embedding: the true or a padded size.
    """
    hidden, is_tied = model.hidden_size, model.share_embeddings_and_output_weights
    yield Parameter(
        name="embedding.word_embeddings.weight",
        core_name="embedding.word_embeddings.weight",
        hugging_face=("model.embed_tokens.weight",),
        shape=(vocab_size, hidden),
        init="normal",
        tp_dim=0,
        arrangement="vocabulary",
        is_multiplied=is_tied,
        repeated_as=("lm_head.weight",) if is_tied else (),
    )
    for layer in range(model.num_layers):
        yield from _layer(model, layer)
    yield Parameter(
        name="decoder.final_norm.weight",
        core_name="decoder.final_norm.weight",
        hugging_face=("model.norm.weight",),
        shape=(hidden,),
        init="ones",
    )
    if not is_tied:
        yield Parameter(
            name="output_layer.weight",
            core_name="output_layer.weight",
            hugging_face=("lm_head.weight",),
            shape=(vocab_size, hidden),
            init="normal",
            tp_dim=0,
            arrangement="vocabulary",
            is_multiplied=True,
        )


def _layer(model: ModelConfig, layer: int) -> Iterator[Parameter]:
    h, f, d = model.hidden_size, model.ffn_hidden_size, model.head_width
    q, kv = model.num_attention_heads * d, model.query_groups * d

    def row(
        name: str,
        hugging_face: str,
        shape: Shape,
        init: InitKind,
        tp_dim: int | None = None,
        arrangement: Arrangement = "plain",
    ) -> Parameter:
        is_mlp = name.startswith(("mlp.", "pre_mlp_"))
        return Parameter(
            name=f"decoder.layers.{layer}.{name}",
            core_name=f"decoder.layers.{SYMBOLS_PER_LAYER * layer + is_mlp}.{name}",
            hugging_face=expand_braces(f"model.layers.{layer}.{hugging_face}"),
            shape=shape,
            init=init,
            tp_dim=tp_dim,
            arrangement=arrangement,
            is_multiplied=len(shape) == 2,
        )

    qkv: Arrangement = "query_key_value"
    yield row("input_layernorm.weight", "input_layernorm.weight", (h,), "ones")
    yield row("self_attention.linear_qkv.weight", "self_attn.{q,k,v}_proj.weight", (q + 2 * kv, h), "normal", 0, qkv)
    if model.add_qkv_bias:
        yield row("self_attention.linear_qkv.bias", "self_attn.{q,k,v}_proj.bias", (q + 2 * kv,), "zeros", 0, qkv)
    if model.qk_layernorm:
        yield row("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", (d,), "ones")
        yield row("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", (d,), "ones")
    yield row("self_attention.linear_proj.weight", "self_attn.o_proj.weight", (h, q), "scaled_normal", 1)
    yield row("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", (h,), "ones")
    yield row("mlp.linear_fc1.weight", "mlp.{gate,up}_proj.weight", (2 * f, h), "normal", 0, "gate_up")
    yield row("mlp.linear_fc2.weight", "mlp.down_proj.weight", (h, f), "scaled_normal", 1)


def core_name(local_name: str, *, layer_offset: int) -> str:
    """Return megatron-core's name in the whole model for a parameter as one model chunk calls it.

    Args:
        local_name: Name within the chunk, without wrappers.
        layer_offset: Pattern symbols in all preceding pipeline segments.
    """
    for fused, own in _FUSED_NORMS:
        local_name = local_name.replace(fused, own)
    return re.sub(
        r"(?<=decoder\.layers\.)\d+", lambda match: str(int(match.group()) + layer_offset), local_name, count=1
    )
