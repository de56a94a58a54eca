"""The corpora of a chat run, made from files of conversations."""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import xxhash

from megatron_7b.data.conversations.reading import NAME, read_conversations
from megatron_7b.data.conversations.trained import ConversationEncoder
from megatron_7b.data.records.corpus import EncodedRecord
from megatron_7b.finetune.corpora import encoded_corpora
from megatron_7b.finetune.preparation import Preparation, PreparedData
from megatron_7b.tokenizer import Tokenizer
from megatron_7b.tokenizer.chat_template import ChatTemplate
from megatron_7b.tokenizer.default_chat_template import find_chat_template

_TEMPLATE_FILE = "chat_template.jinja"
_VERSION = "2"
"""Of how conversations are encoded; part of the name of what is made from them."""


def prepare_chat(wanted: Preparation) -> PreparedData:
    """Encode the files of conversations that a configuration names, or find what they were encoded into.

    Raises:
        DataFormatError: Conversations cannot be used; all mistakes of a file are named.
        FileNotFoundError: Something is missing, and not to be made.
    """
    tokenizer, train_on = wanted.tokenizer, wanted.config.finetune.train_on
    source = chat_template_of(wanted)
    encoder = ConversationEncoder(tokenizer, ChatTemplate(tokenizer, source), train_on)

    def encode(file: Path) -> Iterator[EncodedRecord]:
        return (one.record for _, one in read_conversations(file, encoder.encode))

    made_with = f"{_VERSION}\n{tokenizer.identity}\n{encoder.template.identity}\n{train_on}"
    prepared = encoded_corpora(wanted, encode, kind=NAME, made_with=made_with, options={"train_on": train_on})
    return dataclasses.replace(prepared, tokenizer=kept_tokenizer(wanted, source))


def chat_template_of(wanted: Preparation) -> str | None:
    """Return the template that conversations are spelled out by; None: the tokenizer's own."""
    given = wanted.config.finetune.chat_template
    return find_chat_template(wanted.tokenizer, None if given is None else Path(given))


def kept_tokenizer(wanted: Preparation, template: str | None) -> Path | None:
    """Return a folder of the tokenizer with a template, which checkpoints of the run carry; make it if it is missing.

    Args:
        wanted: What is prepared.
        template: What `chat_template_of` returns.

    Returns:
        None if the tokenizer of the weights will do.

    Raises:
        FileNotFoundError: It is missing, and not to be made.
    """
    tokenizer = wanted.tokenizer
    if template is None and wanted.config.data.tokenizer is None:
        return None
    digest = xxhash.xxh3_64(tokenizer.identity.encode())
    digest.update((template or ChatTemplate(tokenizer).identity).encode())
    target = wanted.data_folder / f"tokenizer-{digest.hexdigest()[:8]}"
    if not target.is_dir():
        if not wanted.make:
            raise FileNotFoundError(target)
        _save(tokenizer, template, target)
    return target


def _save(tokenizer: Tokenizer, template: str | None, target: Path) -> None:
    beside = target.with_name(target.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    tokenizer.save(beside)
    if template is not None:
        (beside / _TEMPLATE_FILE).write_text(template, encoding="utf-8")
    beside.rename(target)
