"""Heads of an encoder whose folder has none: the initial values that a fresh run would give it."""

from typing import TYPE_CHECKING

from megatron_7b.config import TrainingConfig
from megatron_7b.config.schema import ModelConfig
from megatron_7b.conversion.weights import PlannedTensor, plan_weights
from megatron_7b.model.parameters import Shape

if TYPE_CHECKING:
    from torch import Tensor


def fresh_shapes(model: ModelConfig, vocab_size: int, heads: tuple[str, ...]) -> dict[str, Shape]:
    """Return the shape of each tensor of some heads, by its Hugging Face name.

    Args:
        model: Shape of the model.
        vocab_size: True vocabulary size.
        heads: Beginnings of the names of their tensors.
    """
    return {
        name: shape
        for entry in _of_heads(model, vocab_size, heads)
        for name, shape in zip(entry.hugging_face, entry.mapping.hugging_face_shapes, strict=True)
    }


def fresh_tensors(
    model: ModelConfig, vocab_size: int, heads: tuple[str, ...], *, seed: int | None = None
) -> "dict[str, Tensor]":
    """Return each tensor of some heads, by its Hugging Face name.

    Args:
        model: Shape of the model.
        vocab_size: True vocabulary size.
        heads: Beginnings of the names of their tensors.
        seed: Of the run that trains them; None: the usual one.
    """
    from megatron_7b.model.initialization import initial_shard

    tensors: dict[str, Tensor] = {}
    for entry in _of_heads(model, vocab_size, heads):
        values = initial_shard(
            entry.parameter,
            model=model,
            seed=TrainingConfig().seed if seed is None else seed,
            tp_rank=0,
            tp_size=1,
            vocab_size=vocab_size,
        )
        tensors |= zip(entry.hugging_face, entry.mapping.to_hugging_face(values), strict=True)
    return tensors


def _of_heads(model: ModelConfig, vocab_size: int, heads: tuple[str, ...]) -> list[PlannedTensor]:
    return [entry for entry in plan_weights(model, vocab_size) if entry.hugging_face[0].startswith(heads)]
