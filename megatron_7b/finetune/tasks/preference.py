"""The corpora of a preference run, made from files of pairs or of labelled replies."""

import dataclasses

from megatron_7b.data.conversations.trained import ConversationEncoder
from megatron_7b.data.preferences.encoding import LABELLED, PAIRS, PreferenceEncoder
from megatron_7b.finetune.corpora import encoded_corpora
from megatron_7b.finetune.preparation import Preparation, PreparedData
from megatron_7b.finetune.tasks.chat import chat_template_of, kept_tokenizer
from megatron_7b.tokenizer.chat_template import ChatTemplate

_VERSION = "1"
"""Of how preferences are encoded; part of the name of what is made from them."""


def prepare_preference(wanted: Preparation) -> PreparedData:
    """Encode the files of preferences that a configuration names, or find what they were encoded into.

    Raises:
        ConfigError: The tokenizer has no token that ends a reply.
        DataFormatError: Preferences cannot be used; all mistakes of a file are named.
        FileNotFoundError: Something is missing, and not to be made.
    """
    tokenizer, source = wanted.tokenizer, chat_template_of(wanted)
    template = ChatTemplate(tokenizer, source)
    encoder = PreferenceEncoder(tokenizer, ConversationEncoder(tokenizer, template))
    is_labelled = wanted.config.finetune.preference_loss == "kto"
    kind, encode = (LABELLED, encoder.labelled) if is_labelled else (PAIRS, encoder.pairs)
    made_with = f"{_VERSION}\n{kind}\n{tokenizer.identity}\n{template.identity}"
    prepared = encoded_corpora(wanted, encode, kind=kind, made_with=made_with, options={})
    return dataclasses.replace(prepared, tokenizer=kept_tokenizer(wanted, source))
