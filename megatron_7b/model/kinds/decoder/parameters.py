"""The parameters of a decoder, with the names and shapes that they have at Hugging Face."""

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from megatron_7b.config.schema import ModelConfig
from megatron_7b.model.parameters import Arrangement, InitKind, Parameter, Shape, expand_braces

SYMBOLS_PER_LAYER = 2
"""megatron-core's hybrid pattern counts attention and MLP of a layer separately: layer i is its 2i and 2i + 1."""

_LLAMA: Mapping[str, str] = {
    "embedding.word_embeddings": "model.embed_tokens",
    "layer": "model.layers.{layer}.",
    "input_layernorm": "input_layernorm",
    "self_attention.linear_qkv": "self_attn.{q,k,v}_proj",
    "self_attention.q_layernorm": "self_attn.q_norm",
    "self_attention.k_layernorm": "self_attn.k_norm",
    "self_attention.linear_proj": "self_attn.o_proj",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "mlp.linear_fc1": "mlp.{gate,up}_proj",
    "mlp.linear_fc2": "mlp.down_proj",
    "decoder.final_norm": "model.norm",
    "output_layer": "lm_head",
}
_QWEN3_MOE: Mapping[str, str] = {
    **_LLAMA,
    "mlp.router": "mlp.gate",
    "mlp.experts.linear_fc1": "mlp.experts.{expert}.{{gate,up}}_proj",
    "mlp.experts.linear_fc2": "mlp.experts.{expert}.down_proj",
}
_MIXTRAL: Mapping[str, str] = {
    **_LLAMA,
    "mlp.router": "block_sparse_moe.gate",
    "mlp.experts.linear_fc1": "block_sparse_moe.experts.{expert}.{{w1,w3}}",
    "mlp.experts.linear_fc2": "block_sparse_moe.experts.{expert}.w2",
}
_GPT2: Mapping[str, str] = {
    "embedding.word_embeddings": "transformer.wte",
    "embedding.position_embeddings": "transformer.wpe",
    "layer": "transformer.h.{layer}.",
    "input_layernorm": "ln_1",
    "self_attention.linear_qkv": "attn.c_attn",
    "self_attention.linear_proj": "attn.c_proj",
    "pre_mlp_layernorm": "ln_2",
    "mlp.linear_fc1": "mlp.c_fc",
    "mlp.linear_fc2": "mlp.c_proj",
    "decoder.final_norm": "transformer.ln_f",
    "output_layer": "lm_head",
}

_NAMES: Mapping[str, Mapping[str, str]] = {"gpt2": _GPT2, "mixtral": _MIXTRAL, "qwen3_moe": _QWEN3_MOE}
"""Of all others: those of Llama."""

_HEADS: Mapping[str, str] = {
    "sequence_classification": "score",
    "token_classification": "score",
    "question_answering": "qa_outputs",
}
_GPT2_HEADS: Mapping[str, str] = {**_HEADS, "token_classification": "classifier"}
_RENAMED_FOR_ANSWERS = ("llama", "qwen2", "qwen3")
"""Architectures whose …ForQuestionAnswering has its layers as `transformer.…` where all its others have `model.…`."""

# Transformer Engine fuses a norm into the linear layer that follows it.
_FUSED_NORMS = (
    (".self_attention.linear_qkv.layer_norm_", ".input_layernorm."),
    (".mlp.linear_fc1.layer_norm_", ".pre_mlp_layernorm."),
)


def parameters(model: ModelConfig, vocab_size: int) -> Iterator[Parameter]:
    """Yield every parameter in the order of the forward pass.

    Args:
        model: The shape of the model.
        vocab_size: Rows of the embedding: the true or a padded size.
    """
    table = _Rows(model)
    hidden, is_tied = model.hidden_size, model.share_embeddings_and_output_weights and not model.has_head
    vocabulary = (vocab_size, hidden)
    yield table.row(
        "embedding.word_embeddings", "weight", vocabulary, "normal", 0, "vocabulary",
        is_multiplied=is_tied, repeated_as=("lm_head.weight",) if is_tied else (),
    )  # fmt: skip
    if model.traits.position_embedding_type == "learned_absolute":
        positions = (model.max_position_embeddings, hidden)
        yield table.row("embedding.position_embeddings", "weight", positions, "normal", is_multiplied=False)
    for layer in range(model.num_layers):
        yield from table.layer(layer)
    yield from table.norm("decoder.final_norm", hidden)
    if model.has_head:
        yield from table.head()
    elif not is_tied:
        yield table.row("output_layer", "weight", vocabulary, "normal", 0, "vocabulary")


class _Rows:
    """Makes the rows of one model's table."""

    def __init__(self, model: ModelConfig) -> None:
        self._model = model
        self._is_gpt2 = model.architecture == "gpt2"
        names, heads = _NAMES.get(model.architecture, _LLAMA), _GPT2_HEADS if self._is_gpt2 else _HEADS
        self._names = {**names, "task_head": heads[model.head]} if model.has_head else names
        self._is_renamed = model.head == "question_answering" and model.architecture in _RENAMED_FOR_ANSWERS

    def layer(self, layer: int) -> Iterator[Parameter]:
        """Yield the parameters of one layer: attention, then MLP."""
        model, attention, mlp = self._model, SYMBOLS_PER_LAYER * layer, SYMBOLS_PER_LAYER * layer + 1
        h, f, d = model.hidden_size, model.ffn_hidden_size, model.head_width
        q, kv = model.num_attention_heads * d, model.query_groups * d
        qkv: Arrangement = "query_key_value"
        yield from self.norm("input_layernorm", h, layer, attention)
        bias = model.add_qkv_bias or model.traits.add_bias_linear
        yield from self.linear("self_attention.linear_qkv", (q + 2 * kv, h), layer, attention, qkv, bias=bias)
        if model.qk_layernorm:
            yield from self.norm("self_attention.q_layernorm", d, layer, attention)
            yield from self.norm("self_attention.k_layernorm", d, layer, attention)
        yield from self.linear("self_attention.linear_proj", (h, q), layer, attention)
        yield from self.norm("pre_mlp_layernorm", h, layer, mlp)
        if model.num_moe_experts is not None:
            yield from self.experts(layer, mlp)
            return
        if model.traits.gated_linear_unit:
            yield from self.linear("mlp.linear_fc1", (2 * f, h), layer, mlp, "gate_up")
        else:
            yield from self.linear("mlp.linear_fc1", (f, h), layer, mlp)
        yield from self.linear("mlp.linear_fc2", (h, f), layer, mlp)

    def experts(self, layer: int, symbol: int) -> Iterator[Parameter]:
        """Yield what chooses the experts of a layer, then the two matrices of each."""
        model = self._model
        h, f, num_experts = model.hidden_size, model.expert_width, model.num_moe_experts
        assert num_experts is not None
        yield self.row("mlp.router", "weight", (num_experts, h), "normal", layer=layer, symbol=symbol)
        for expert in range(num_experts):
            of_expert = functools.partial(self.row, suffix="weight", layer=layer, symbol=symbol, expert=expert)
            yield of_expert("mlp.experts.linear_fc1", shape=(2 * f, h), init="normal", tp_dim=0, arrangement="gate_up")
            yield of_expert("mlp.experts.linear_fc2", shape=(h, f), init="scaled_normal", tp_dim=1)

    def head(self) -> Iterator[Parameter]:
        """Yield the layer in the place of the output layer; only a classifier of whole texts has no bias."""
        model = self._model
        yield replace(
            self.row("task_head", "weight", (model.num_labels, model.hidden_size), "normal"), is_task_head=True
        )
        if model.head != "sequence_classification":
            yield replace(self.row("task_head", "bias", (model.num_labels,), "zeros"), is_task_head=True)

    def norm(self, name: str, width: int, layer: int | None = None, symbol: int | None = None) -> Iterator[Parameter]:
        """Yield the weight of a norm, and its bias if it has one."""
        yield self.row(name, "weight", (width,), "ones", layer=layer, symbol=symbol)
        if self._model.traits.normalization == "LayerNorm":
            yield self.row(name, "bias", (width,), "zeros", layer=layer, symbol=symbol)

    def linear(
        self,
        name: str,
        shape: Shape,
        layer: int,
        symbol: int,
        arrangement: Arrangement = "plain",
        *,
        bias: bool | None = None,
    ) -> Iterator[Parameter]:
        """Yield the weight of a linear layer, sharded along its outputs unless it writes into the residual stream."""
        writes = name.endswith(("linear_proj", "linear_fc2"))
        init: InitKind = "scaled_normal" if writes else "normal"
        yield self.row(name, "weight", shape, init, 1 if writes else 0, arrangement, layer=layer, symbol=symbol)
        if self._model.traits.add_bias_linear if bias is None else bias:
            tp_dim = None if writes else 0
            yield self.row(name, "bias", shape[:1], "zeros", tp_dim, arrangement, layer=layer, symbol=symbol)

    def row(
        self,
        name: str,
        suffix: str,
        shape: Shape,
        init: InitKind,
        tp_dim: int | None = None,
        arrangement: Arrangement = "plain",
        *,
        layer: int | None = None,
        symbol: int | None = None,
        expert: int | None = None,
        is_multiplied: bool | None = None,
        repeated_as: tuple[str, ...] = (),
    ) -> Parameter:
        """Return one row, of a layer if that is given."""
        theirs = f"{self._names[name]}.{suffix}"
        within = core_within = f"{name}.{suffix}"
        share = 1.0
        if expert is not None:
            theirs = theirs.format(expert=expert)
            within = within.replace(".experts.", f".experts.{expert}.")
            core_within = core_within.replace(".experts.", f".experts.local_experts.{expert}.")
            share = self._model.moe_router_topk / (self._model.num_moe_experts or 1)
        if layer is not None:
            theirs = self._names["layer"].format(layer=layer) + theirs
        if self._is_renamed:
            theirs = re.sub(r"^model\.", "transformer.", theirs)
        is_matrix = len(shape) == 2
        return Parameter(
            name=within if layer is None else f"decoder.layers.{layer}.{within}",
            core_name=core_within if layer is None else f"decoder.layers.{symbol}.{core_within}",
            hugging_face=expand_braces(theirs),
            shape=shape,
            init=init,
            tp_dim=tp_dim,
            arrangement=arrangement,
            # GPT-2 stores the weights of its layers the other way round, [in, out].
            is_transposed=self._is_gpt2 and is_matrix and layer is not None,
            is_multiplied=is_matrix if is_multiplied is None else is_multiplied,
            share_of_tokens=share,
            is_head=layer is None,
            repeated_as=repeated_as,
        )


def core_name(local_name: str, *, layer_offset: int, expert_offset: int = 0) -> str:
    """Return megatron-core's name in the whole model for a parameter as one model chunk calls it.

    Args:
        local_name: Name within the chunk, without wrappers.
        layer_offset: Pattern symbols in all preceding pipeline segments.
        expert_offset: Experts of a layer that preceding expert-parallel ranks hold.
    """
    local_name = re.sub(
        r"(?<=\.local_experts\.)\d+", lambda match: str(int(match.group()) + expert_offset), local_name, count=1
    )
    for fused, own in _FUSED_NORMS:
        local_name = local_name.replace(fused, own)
    return re.sub(
        r"(?<=decoder\.layers\.)\d+", lambda match: str(int(match.group()) + layer_offset), local_name, count=1
    )
