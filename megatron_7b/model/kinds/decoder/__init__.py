"""Decoders with pre-normalisation: RMSNorm, gated MLP, rotary positions, grouped-query attention: Llama and its kin."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_7b.config.schema import ModelConfig
from megatron_7b.model.kinds.decoder.parameters import SYMBOLS_PER_LAYER, parameters
from megatron_7b.model.parameters import Parameter

if TYPE_CHECKING:
    from megatron_7b.model.kinds.decoder.network import LanguageModel
    from megatron_7b.model.kinds.kind import ChunkPlan


class Decoder:
    """The kind of model that predicts the next token from those before it."""

    core_layers_per_layer = SYMBOLS_PER_LAYER

    def attended_positions(self, model: ModelConfig, seq_length: int, predicted_share: float) -> float:  # noqa: ARG002
        """Return half of the sequence: a token attends to those before it, or to the newest of them."""
        within = (min(1.0, (window or seq_length) / max(1, seq_length)) for window in model.layer_windows)
        return sum(seq_length * share * (1 - share / 2) for share in within)

    def parameters(self, model: ModelConfig, vocab_size: int) -> Iterator[Parameter]:
        """Yield every parameter in the order of the forward pass."""
        return parameters(model, vocab_size)

    def build_chunk(self, plan: "ChunkPlan") -> "LanguageModel":
        """Build one model chunk of this rank."""
        from megatron_7b.model.kinds.decoder.network import build_chunk

        return build_chunk(plan)
