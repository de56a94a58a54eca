"""The parameters of an encoder, with BERT's names and shapes at Hugging Face."""

from collections.abc import Iterator
from dataclasses import replace

from megatron_7b.config.schema import ModelConfig
from megatron_7b.model.parameters import Arrangement, InitKind, Parameter, Shape, expand_braces

_HEAD = "cls.predictions."


def parameters(model: ModelConfig, vocab_size: int) -> Iterator[Parameter]:
    """Yield every parameter in the order of the forward pass.

    Args:
        model: The shape of the model.
        vocab_size: Rows of the embedding: the true or a padded size.
    """
    h, is_post = model.hidden_size, _is_post(model)
    is_tied = model.share_embeddings_and_output_weights and not model.has_head
    yield _row(
        "embedding.word_embeddings.weight", "bert.embeddings.word_embeddings.weight", (vocab_size, h), "normal", 0,
        "vocabulary", is_multiplied=is_tied, is_head=True, repeated_as=(f"{_HEAD}decoder.weight",) if is_tied else (),
    )  # fmt: skip
    positions = (model.max_position_embeddings, h)
    yield _embedding("position_embeddings", "position_embeddings", positions)
    if model.num_tokentypes:
        yield _embedding("tokentype_embeddings", "token_type_embeddings", (model.num_tokentypes, h))
    if is_post:
        core = "embedding.embedding_dropout.0"  # where it is put to be applied before dropout
        yield from _norm("embedding.norm", "bert.embeddings.LayerNorm", h, core)
    for layer in range(model.num_layers):
        yield from _layer(model, layer)
    if not is_post:
        yield from _norm("encoder.final_norm", "bert.encoder.ln", h, "encoder.final_layernorm")
    yield from _task_head(model) if model.has_head else _prediction_heads(model, vocab_size)


def _task_head(model: ModelConfig) -> Iterator[Parameter]:
    """Yield what takes the place of the output layer; texts are classified by their first token, which is pooled."""
    h, theirs = model.hidden_size, "qa_outputs" if model.head == "question_answering" else "classifier"
    if model.head == "sequence_classification":
        yield from _as_head(_small_linear("pooler", "bert.pooler.dense", (h, h)))
    yield from _as_head(_small_linear("task_head", theirs, (model.num_labels, h)))


def _as_head(rows: Iterator[Parameter]) -> Iterator[Parameter]:
    return (replace(row, is_task_head=True) for row in rows)


def _prediction_heads(model: ModelConfig, vocab_size: int) -> Iterator[Parameter]:
    h, is_tied = model.hidden_size, model.share_embeddings_and_output_weights
    yield from _linear("lm_head", f"{_HEAD}transform.dense", (h, h))
    yield from _norm("lm_norm", f"{_HEAD}transform.LayerNorm", h)
    if not is_tied:
        output = f"{_HEAD}decoder.weight"
        yield _row("output_layer.weight", output, (vocab_size, h), "normal", 0, "vocabulary", True, is_head=True)
    # transformers computes with the decoder's bias; it ties the other to it where it ties the weights, else ignores it.
    bias, repeated = (f"{_HEAD}bias", (f"{_HEAD}decoder.bias",)) if is_tied else (_HEAD + "{decoder.bias,bias}", ())
    yield _row("output_layer.bias", bias, (vocab_size,), "zeros", 0, "vocabulary", repeated_as=repeated)
    if model.add_binary_head:
        yield from _small_linear("pooler", "bert.pooler.dense", (h, h))
        yield from _small_linear("binary_head", "cls.seq_relationship", (2, h))


def _layer(model: ModelConfig, layer: int) -> Iterator[Parameter]:
    h, f, q = model.hidden_size, model.ffn_hidden_size, model.num_attention_heads * model.head_width
    ours, theirs = f"encoder.layers.{layer}.", f"bert.encoder.layer.{layer}."
    is_post = _is_post(model)
    if not is_post:
        yield from _norm(f"{ours}input_layernorm", f"{theirs}attention.ln", h)
    qkv: Arrangement = "query_key_value"
    names = theirs + "attention.self.{query,key,value}."
    yield _row(f"{ours}self_attention.linear_qkv.weight", f"{names}weight", (3 * q, h), "normal", 0, qkv, True)
    yield _row(f"{ours}self_attention.linear_qkv.bias", f"{names}bias", (3 * q,), "zeros", 0, qkv)
    yield from _row_linear(f"{ours}self_attention.linear_proj", f"{theirs}attention.output.dense", (h, q))
    if is_post:
        yield from _norm(f"{ours}post_attention_layernorm", f"{theirs}attention.output.LayerNorm", h)
    else:
        yield from _norm(f"{ours}pre_mlp_layernorm", f"{theirs}ln", h)
    yield _row(f"{ours}mlp.linear_fc1.weight", f"{theirs}intermediate.dense.weight", (f, h), "normal", 0, "plain", True)
    yield _row(f"{ours}mlp.linear_fc1.bias", f"{theirs}intermediate.dense.bias", (f,), "zeros", 0)
    yield from _row_linear(f"{ours}mlp.linear_fc2", f"{theirs}output.dense", (h, f))
    if is_post:
        yield from _norm(f"{ours}post_mlp_layernorm", f"{theirs}output.LayerNorm", h)


def _is_post(model: ModelConfig) -> bool:
    return model.traits.norm_placement == "post"


def _row(
    name: str,
    hugging_face: str,
    shape: Shape,
    init: InitKind,
    tp_dim: int | None = None,
    arrangement: Arrangement = "plain",
    is_multiplied: bool = False,
    is_head: bool = False,
    repeated_as: tuple[str, ...] = (),
    core_name: str | None = None,
) -> Parameter:
    return Parameter(
        name=name,
        core_name=core_name or name,
        hugging_face=expand_braces(hugging_face),
        shape=shape,
        init=init,
        tp_dim=tp_dim,
        arrangement=arrangement,
        is_multiplied=is_multiplied,
        is_head=is_head,
        repeated_as=repeated_as,
    )


def _embedding(name: str, hugging_face: str, shape: Shape) -> Parameter:
    return _row(f"embedding.{name}.weight", f"bert.embeddings.{hugging_face}.weight", shape, "normal")


def _norm(name: str, hugging_face: str, width: int, core: str | None = None) -> Iterator[Parameter]:
    core = core or name
    yield _row(f"{name}.weight", f"{hugging_face}.weight", (width,), "ones", core_name=f"{core}.weight")
    yield _row(f"{name}.bias", f"{hugging_face}.bias", (width,), "zeros", core_name=f"{core}.bias")


def _linear(name: str, hugging_face: str, shape: Shape) -> Iterator[Parameter]:
    """A layer that every tensor rank holds whole, as it works on few tokens."""
    yield _row(f"{name}.weight", f"{hugging_face}.weight", shape, "normal", is_multiplied=True, is_head=True)
    yield _row(f"{name}.bias", f"{hugging_face}.bias", shape[:1], "zeros")


def _small_linear(name: str, hugging_face: str, shape: Shape) -> Iterator[Parameter]:
    """The same for one token of a sample, which is not worth counting."""
    yield _row(f"{name}.weight", f"{hugging_face}.weight", shape, "normal")
    yield _row(f"{name}.bias", f"{hugging_face}.bias", shape[:1], "zeros")


def _row_linear(name: str, hugging_face: str, shape: Shape) -> Iterator[Parameter]:
    yield _row(f"{name}.weight", f"{hugging_face}.weight", shape, "scaled_normal", 1, is_multiplied=True)
    yield _row(f"{name}.bias", f"{hugging_face}.bias", shape[:1], "zeros")
