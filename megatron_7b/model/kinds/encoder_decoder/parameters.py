"""The parameters of an encoder-decoder, with T5's names and shapes at Hugging Face, and its initial values."""

from collections.abc import Iterator
from typing import Literal

from megatron_7b.config.schema import ModelConfig
from megatron_7b.model.parameters import Arrangement, Parameter, Shape, expand_braces

type Stack = Literal["encoder", "decoder"]


def parameters(model: ModelConfig, vocab_size: int) -> Iterator[Parameter]:
    """Yield every parameter in the order of the forward pass.

    Args:
        model: The shape of the model.
        vocab_size: Rows of the embedding: the true or a padded size.
    """
    h, is_tied = model.hidden_size, model.share_embeddings_and_output_weights
    vocabulary: Arrangement = "vocabulary"
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", *(("lm_head.weight",) if is_tied else ()))
    # Logits of a spread of 1: an output layer takes its inputs as they are, a scaled one divides them by sqrt(h).
    of_output = h**-0.5
    of_embedding = of_output if is_tied and not model.scale_output_states else 1.0
    yield _row(
        "embedding.word_embeddings.weight", "shared.weight", (vocab_size, h), of_embedding, 0, vocabulary,
        is_multiplied=is_tied, is_head=True, repeated_as=copies,
    )  # fmt: skip
    yield from _stack(model, "encoder", model.num_layers)
    yield from _stack(model, "decoder", model.decoder_layers)
    if not is_tied:
        std = 1.0 if model.scale_output_states else of_output
        yield _row("output_layer.weight", "lm_head.weight", (vocab_size, h), std, 0, vocabulary, is_head=True)


def _stack(model: ModelConfig, stack: Stack, num_layers: int) -> Iterator[Parameter]:
    shape = (model.relative_attention_num_buckets, model.num_attention_heads)
    theirs = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    yield _row(
        f"{stack}.relative_pos_emb.weight", theirs, shape, model.hidden_size**-0.5, 1, is_multiplied=False,
        core_name=f"{stack}_relative_pos_emb.weight",
    )  # fmt: skip
    for layer in range(num_layers):
        yield from _layer(model, stack, layer)
    core = f"{stack}.final_layernorm"
    yield _norm(f"{stack}.final_norm", f"{stack}.final_layer_norm", model.hidden_size, core)


def _layer(model: ModelConfig, stack: Stack, layer: int) -> Iterator[Parameter]:
    """Yield the parameters of one layer.

    Source: Hugging Face's T5 and T5's own release draw each matrix by its inputs, and queries narrower by sqrt(d)
    because scores are not divided by it.
    """
    h, f, d = model.hidden_size, model.ffn_hidden_size, model.head_width
    q, is_decoder = model.num_attention_heads * d, stack == "decoder"
    ours, theirs = f"{stack}.layers.{layer}.", f"{stack}.block.{layer}.layer."
    yield _norm(f"{ours}input_layernorm", f"{theirs}0.layer_norm", h)
    names, shape = f"{theirs}0.SelfAttention.{{q,k,v}}.weight", (3 * q, h)
    yield _row(
        f"{ours}self_attention.linear_qkv.weight", names, shape, h**-0.5, 0, "query_key_value",
        query_scale=d**-0.5, is_head=is_decoder,
    )  # fmt: skip
    projection = f"{ours}self_attention.linear_proj.weight"
    yield _row(projection, f"{theirs}0.SelfAttention.o.weight", (h, q), q**-0.5, 1, is_head=is_decoder)
    if is_decoder:
        yield from _cross_attention(f"{ours}", f"{theirs}1.", h, q, d)
    mlp = f"{theirs}{2 if is_decoder else 1}."
    yield _norm(f"{ours}pre_mlp_layernorm", f"{mlp}layer_norm", h)
    is_gated = model.traits.gated_linear_unit
    up, rows = ("{wi_0,wi_1}", 2 * f) if is_gated else ("wi", f)
    arrangement: Arrangement = "gate_up" if is_gated else "plain"
    names = f"{mlp}DenseReluDense.{up}.weight"
    yield _row(f"{ours}mlp.linear_fc1.weight", names, (rows, h), h**-0.5, 0, arrangement, is_head=is_decoder)
    names = f"{mlp}DenseReluDense.wo.weight"
    yield _row(f"{ours}mlp.linear_fc2.weight", names, (h, f), f**-0.5, 1, is_head=is_decoder)


def _cross_attention(ours: str, theirs: str, h: int, q: int, d: int) -> Iterator[Parameter]:
    yield _norm(f"{ours}pre_cross_attn_layernorm", f"{theirs}layer_norm", h)
    ours, theirs = f"{ours}cross_attention.", f"{theirs}EncDecAttention."
    yield _row(f"{ours}linear_q.weight", f"{theirs}q.weight", (q, h), (h * d) ** -0.5, 0, is_head=True)
    yield _row(f"{ours}linear_kv.weight", f"{theirs}{{k,v}}.weight", (2 * q, h), h**-0.5, 0, "key_value")
    yield _row(f"{ours}linear_proj.weight", f"{theirs}o.weight", (h, q), q**-0.5, 1, is_head=True)


def _row(
    name: str,
    hugging_face: str,
    shape: Shape,
    std: float,
    tp_dim: int,
    arrangement: Arrangement = "plain",
    *,
    query_scale: float = 1.0,
    is_multiplied: bool = True,
    is_head: bool = False,
    repeated_as: tuple[str, ...] = (),
    core_name: str | None = None,
) -> Parameter:
    return Parameter(
        name=name,
        core_name=core_name or name,
        hugging_face=expand_braces(hugging_face),
        shape=shape,
        init="normal",
        std=std,
        query_scale=query_scale,
        tp_dim=tp_dim,
        arrangement=arrangement,
        is_multiplied=is_multiplied,
        is_head=is_head,
        repeated_as=repeated_as,
    )


def _norm(name: str, hugging_face: str, width: int, core: str | None = None) -> Parameter:
    return Parameter(
        name=f"{name}.weight",
        core_name=f"{core or name}.weight",
        hugging_face=(f"{hugging_face}.weight",),
        shape=(width,),
        init="ones",
    )
