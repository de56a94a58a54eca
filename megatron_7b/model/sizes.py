"""Sizes of a model as pure arithmetic: parameters, padded vocabulary, FLOPs. Imports no torch."""

import math
from dataclasses import dataclass

from megatron_7b.config.schema import ModelConfig
from megatron_7b.errors import ConfigError


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model by part, in elements, without vocabulary padding."""

    embedding: int
    """Word embeddings, [v, h]."""
    output: int
    """Output layer, [v, h]; 0 where it shares the embeddings."""
    matrices_per_layer: int
    """Weights of one layer that multiply activations: qkv, projection, gate, up and down."""
    vectors_per_layer: int
    """Biases and norms of one layer."""
    final_norm: int
    num_layers: int

    @property
    def total(self) -> int:
        """All parameters; shared ones count once."""
        per_layer = self.matrices_per_layer + self.vectors_per_layer
        return self.embedding + self.num_layers * per_layer + self.final_norm + self.output


def head_width(model: ModelConfig) -> int:
    """Channels `d` of one attention head."""
    return model.kv_channels or model.hidden_size // model.num_attention_heads


def query_groups(model: ModelConfig) -> int:
    """Key-value heads `g`."""
    return model.num_query_groups or model.num_attention_heads


def count_by_part(model: ModelConfig, *, vocab_size: int | None = None) -> ParameterCounts:
    """Count the parameters of each part without building any of them.

    Args:
        model: The model's shape.
        vocab_size: True vocabulary size `v`; None takes the configuration's.

    Raises:
        ConfigError: Neither the argument nor the configuration says how large the vocabulary is.
    """
    v, h, d = _vocabulary(model, vocab_size), model.hidden_size, head_width(model)
    n, g = model.num_attention_heads, query_groups(model)
    qkv_width = (n + 2 * g) * d
    norms = 2 * h + (2 * d if model.qk_layernorm else 0)
    return ParameterCounts(
        embedding=v * h,
        output=0 if model.share_embeddings_and_output_weights else v * h,
        matrices_per_layer=qkv_width * h + n * d * h + 3 * model.ffn_hidden_size * h,
        vectors_per_layer=norms + (qkv_width if model.add_qkv_bias else 0),
        final_norm=h,
        num_layers=model.num_layers,
    )


def count_parameters(model: ModelConfig, *, vocab_size: int | None = None) -> int:
    """Exact number of parameters, without vocabulary padding: 6,738,415,616 for Llama 2 7B.

    Raises:
        ConfigError: Neither the argument nor the configuration says how large the vocabulary is.
    """
    return count_by_part(model, vocab_size=vocab_size).total


def padded_vocab_size(vocab_size: int, divisible_by: int, tensor_model_parallel_size: int) -> int:
    """Rows of the embedding as stored: `vocab_size` rounded up so that every rank gets equally many.

    The result is a multiple of both `divisible_by` and the tensor-parallel size (of their least common multiple), so
    sizes that already agree with both stay as they are.
    """
    unit = math.lcm(divisible_by, tensor_model_parallel_size)
    return -(-vocab_size // unit) * unit


def causal_flops_per_token(model: ModelConfig, seq_length: int, *, vocab_size: int | None = None) -> float:
    """FLOPs of one forward and backward pass per token, counting what a causal model has to compute.

    A multiply-add is two FLOPs; the backward pass costs twice the forward. Attention counts the lower triangle only
    (half of s x s), the output layer the true vocabulary; embedding look-up, norms, softmax and recomputation count
    nothing.

    Source: PaLM (Chowdhery et al. 2022), appendix B, with the causal half of the attention term.

    Raises:
        ConfigError: Neither the argument nor the configuration says how large the vocabulary is.
    """
    counts = count_by_part(model, vocab_size=vocab_size)
    output_matrix = _vocabulary(model, vocab_size) * model.hidden_size  # Multiplied also where it is shared.
    matrices = model.num_layers * counts.matrices_per_layer + output_matrix
    # QK^T and PV: 2 * 2 * n * d FLOPs per pair of positions, and s / 2 earlier positions on average.
    attention = model.num_layers * 2 * seq_length * model.num_attention_heads * head_width(model)
    return 3.0 * (2 * matrices + attention)


def _vocabulary(model: ModelConfig, vocab_size: int | None) -> int:
    size = vocab_size if vocab_size is not None else model.vocab_size
    if size is None:
        raise ConfigError(
            "model.vocab_size is none, so the model's size is unknown",
            hint="give model.vocab_size, or the size of the tokenizer",
        )
    return size
