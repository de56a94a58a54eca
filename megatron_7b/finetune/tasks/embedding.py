"""The corpora of an embedding run, made from files of queries."""

from megatron_7b.data.embeddings.encoding import NAME, TextEncoder, encode_queries
from megatron_7b.errors import ConfigError
from megatron_7b.finetune.corpora import encoded_corpora
from megatron_7b.finetune.preparation import Preparation, PreparedData

_VERSION = "1"
"""Of how queries are encoded; part of the name of what is made from them."""


def prepare_embedding(wanted: Preparation) -> PreparedData:
    """Encode the files of queries that a configuration names, or find what they were encoded into.

    Raises:
        ConfigError: The vectors of the model are narrower than a width that is asked for.
        DataFormatError: Queries cannot be used; all mistakes of a file are named.
        FileNotFoundError: Something is missing, and not to be made.
    """
    config, encoder = wanted.config, TextEncoder(wanted.tokenizer)
    widths, width = config.finetune.matryoshka_dims, config.model.hidden_size
    if any(not 0 < one <= width for one in widths):
        raise ConfigError(
            f"finetune.matryoshka_dims is {' '.join(map(str, widths))}, expected numbers from 1 to {width}, the width "
            "of the model"
        )
    length = config.data.seq_length
    made_with = f"{_VERSION}\n{wanted.tokenizer.identity}\n{length}"
    return encoded_corpora(
        wanted,
        lambda file: encode_queries(file, encoder, seq_length=length),
        kind=NAME,
        made_with=made_with,
        options={"seq_length": length},
    )
