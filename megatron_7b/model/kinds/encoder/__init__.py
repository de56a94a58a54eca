"""Encoders that see a whole sentence: BERT, and Megatron's with the norms before attention and MLP."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_7b.config.schema import ModelConfig
from megatron_7b.model.kinds.encoder.parameters import parameters
from megatron_7b.model.parameters import Parameter

if TYPE_CHECKING:
    from megatron_7b.model.kinds.encoder.network import EncoderModel
    from megatron_7b.model.kinds.kind import ChunkPlan


class Encoder:
    """The kind of model that tells hidden tokens from all others of the sentence."""

    core_layers_per_layer = 1

    def attended_positions(self, model: ModelConfig, seq_length: int, predicted_share: float) -> float:  # noqa: ARG002
        """Return the whole sequence: a token attends to all of it."""
        return model.num_layers * seq_length

    def parameters(self, model: ModelConfig, vocab_size: int) -> Iterator[Parameter]:
        """Yield every parameter in the order of the forward pass."""
        return parameters(model, vocab_size)

    def build_chunk(self, plan: "ChunkPlan") -> "EncoderModel":
        """Build one model chunk of this rank."""
        from megatron_7b.model.kinds.encoder.network import build_chunk

        return build_chunk(plan)
