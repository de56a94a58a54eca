"""Encoder-decoders: one stack reads a text, the other writes an answer to it: T5 in its releases 1.0, 1.1 and Flan."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_7b.config.schema import ModelConfig
from megatron_7b.model.kinds.encoder_decoder.parameters import parameters
from megatron_7b.model.parameters import Parameter

if TYPE_CHECKING:
    from megatron_7b.model.kinds.encoder_decoder.network import EncoderDecoderModel
    from megatron_7b.model.kinds.kind import ChunkPlan


class EncoderDecoder:
    """The kind of model that predicts the next token of an answer from those before it and a whole text."""

    core_layers_per_layer = 1

    def attended_positions(self, model: ModelConfig, seq_length: int, predicted_share: float) -> float:
        """A token of the text attends to all of it, one of the answer to all of the text and half of the answer."""
        answer = predicted_share * seq_length
        return model.num_layers * seq_length + predicted_share * model.decoder_layers * (seq_length + answer / 2)

    def parameters(self, model: ModelConfig, vocab_size: int) -> Iterator[Parameter]:
        """Yield every parameter in the order of the forward pass."""
        return parameters(model, vocab_size)

    def build_chunk(self, plan: "ChunkPlan") -> "EncoderDecoderModel":
        """Build the model of this rank."""
        from megatron_7b.model.kinds.encoder_decoder.network import build_chunk

        return build_chunk(plan)
