"""The kinds of models: a folder each, which says what its parameters are and builds a rank's part of it.

To add one, put it into `KINDS`, and the architectures that are of this kind into `config.architectures.ARCHITECTURES`.
"""

from megatron_7b.config.architectures import ARCHITECTURES
from megatron_7b.config.schema import ModelConfig
from megatron_7b.model.kinds.decoder import Decoder
from megatron_7b.model.kinds.encoder import Encoder
from megatron_7b.model.kinds.encoder_decoder import EncoderDecoder
from megatron_7b.model.kinds.kind import ModelKind
from megatron_7b.model.parameters import ParameterTable

__all__ = ["KINDS", "ModelKind", "kind_of", "parameter_table"]

KINDS: dict[str, ModelKind] = {
    "decoder": Decoder(),
    "encoder": Encoder(),
    "encoder_decoder": EncoderDecoder(),
}


def kind_of(model: ModelConfig) -> ModelKind:
    """Return the kind of model that a configuration describes."""
    return KINDS[ARCHITECTURES[model.architecture].kind]


def parameter_table(model: ModelConfig, vocab_size: int) -> ParameterTable:
    """Return the parameters of a model.

    Args:
        model: The shape of the model.
        vocab_size: Rows of the embedding: the true or a padded size.
    """
    return ParameterTable(kind_of(model).parameters(model, vocab_size))
