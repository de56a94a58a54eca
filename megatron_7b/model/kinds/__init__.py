"""The kinds of models: one module each, which says what its parameters are."""

from megatron_7b.config.schema import ModelConfig
from megatron_7b.model.kinds import decoder
from megatron_7b.model.parameters import ParameterTable

__all__ = ["parameter_table"]


def parameter_table(model: ModelConfig, vocab_size: int) -> ParameterTable:
    """Return the parameters of a model.

    Args:
        model: The shape of the model.
        vocab_size: Rows of the embedding: the true or a padded size.
    """
    return ParameterTable(decoder.parameters(model, vocab_size))
