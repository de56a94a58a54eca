"""Sizes of a model as pure arithmetic: parameters, padded vocabulary, FLOPs. Imports no torch."""

import math

from megatron_7b.config.schema import ModelConfig
from megatron_7b.errors import ConfigError
from megatron_7b.model.kinds import kind_of, parameter_table


def count_parameters(model: ModelConfig, *, vocab_size: int | None = None) -> int:
    """Exact number of parameters, without vocabulary padding: 6,738,415,616 for Llama 2 7B. Shared ones count once.

    Raises:
        ConfigError: Neither the argument nor the configuration says how large the vocabulary is.
    """
    table = parameter_table(model, _vocabulary(model, vocab_size))
    return sum(math.prod(row.shape) for row in table.values())


def count_multiplied_parameters(model: ModelConfig, *, vocab_size: int | None = None) -> int:
    """Return how many parameters each token's activations are multiplied by; looked-up embeddings do not count.

    Raises:
        ConfigError: Neither the argument nor the configuration says how large the vocabulary is.
    """
    table = parameter_table(model, _vocabulary(model, vocab_size))
    return round(sum(math.prod(row.shape) * row.share_of_tokens for row in table.values() if row.is_multiplied))


def padded_vocab_size(vocab_size: int, divisible_by: int, tensor_model_parallel_size: int) -> int:
    """Return the rows of the embedding as stored: `vocab_size` rounded up so that every rank gets equally many.

    The result is a multiple of both `divisible_by` and the tensor-parallel size (of their least common multiple), so
    sizes that already agree with both stay as they are.
    """
    unit = math.lcm(divisible_by, tensor_model_parallel_size)
    return -(-vocab_size // unit) * unit


def flops_per_token(
    model: ModelConfig,
    seq_length: int,
    *,
    vocab_size: int | None = None,
    predicted_share: float = 1.0,
    is_frozen: bool = False,
) -> float:
    """FLOPs of one forward and backward pass per token, counting what the model has to compute.

    A multiply-add is two FLOPs; the backward pass costs twice the forward. Attention counts the positions that are
    attended to (in a decoder the lower triangle, half of s x s), the output layer the true vocabulary; embedding
    look-up, norms, softmax and recomputation count nothing.

    Args:
        model: The model's shape.
        seq_length: Tokens `s` of a sequence; in an encoder-decoder those that the encoder reads.
        vocab_size: True vocabulary size; None takes the configuration's.
        predicted_share: How many tokens are predicted for each of them: only these pass the output layer, and the
            decoder of an encoder-decoder.
        is_frozen: Matrices have no gradients, so that the backward pass costs them once the forward.

    Source: PaLM (Chowdhery et al. 2022), appendix B, with the causal half of the attention term.

    Raises:
        ConfigError: Neither the argument nor the configuration says how large the vocabulary is.
    """
    table = parameter_table(model, _vocabulary(model, vocab_size))
    multiplied = [row for row in table.values() if row.is_multiplied]
    matrices = sum(
        math.prod(row.shape) * row.share_of_tokens * (predicted_share if row.is_head else 1.0) for row in multiplied
    )
    # QK^T and PV: 2 * 2 * n * d FLOPs per pair of positions.
    attended = kind_of(model).attended_positions(model, seq_length, predicted_share)
    attention = 4 * attended * model.num_attention_heads * model.head_width
    return (2.0 if is_frozen else 3.0) * 2 * matrices + 3.0 * attention


def _vocabulary(model: ModelConfig, vocab_size: int | None) -> int:
    size = vocab_size if vocab_size is not None else model.vocab_size
    if size is None:
        raise ConfigError(
            "model.vocab_size is none, so the model's size is unknown",
            hint="give model.vocab_size, or the size of the tokenizer",
        )
    return size
