"""Prompts: from text to the tokens that a model is given."""

from dataclasses import dataclass

from megatron_7b.errors import ConfigError
from megatron_7b.tokenizer import Tokenizer
from megatron_7b.tokenizer.surroundings import surrounding_ids


@dataclass(frozen=True)
class Prompt:
    """A text to be continued.

    Attributes:
        text: The text.
        ids: Its tokens.
        is_chat: It is a conversation, spelled out for the model: readers want the reply alone.
        is_source: It is what an encoder reads: the decoder's text is no continuation of it.
    """

    text: str
    ids: tuple[int, ...]
    is_chat: bool = False
    is_source: bool = False


def encode_prompt(text: str, tokenizer: Tokenizer, *, add_bos: bool | None = None) -> Prompt:
    """Return the tokens of a prompt; an empty one begins a document, as one does in training: after another's end.

    Args:
        text: The text.
        tokenizer: What encodes.
        add_bos: Whether the text begins with the tokenizer's bos token; None does what transformers does.

    Raises:
        ConfigError: The tokenizer has no bos token, or the text is empty and no token begins a document.
    """
    if add_bos and tokenizer.bos_id is None:
        raise ConfigError("a bos token is asked for, but the tokenizer has none")
    leading = surrounding_ids(tokenizer)[0] if add_bos is None else ()
    if add_bos and tokenizer.bos_id is not None:
        leading = (tokenizer.bos_id,)
    ids = (*leading, *tokenizer.encode(text))
    if not ids:
        beginning = tokenizer.eod_id if tokenizer.eod_id is not None else tokenizer.bos_id
        if beginning is None:
            raise ConfigError("the prompt is empty, and the tokenizer has no token that begins a document")
        ids = (beginning,)
    return Prompt(text, ids)


def encode_source(text: str, tokenizer: Tokenizer, *, add_bos: bool | None = None) -> Prompt:
    """Return the tokens of a text for an encoder: it ends with the end of document, as texts do in training.

    Args:
        text: The text.
        tokenizer: What encodes.
        add_bos: As for `encode_prompt`.

    Raises:
        ConfigError: The tokenizer has no bos token.
    """
    ending = () if tokenizer.eod_id is None else (tokenizer.eod_id,)
    if not text and ending:
        return Prompt(text, ending, is_source=True)
    ids = encode_prompt(text, tokenizer, add_bos=add_bos).ids
    return Prompt(text, ids if ids[-1:] == ending else (*ids, *ending), is_source=True)
