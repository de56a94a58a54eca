"""A chat template for tokenizers that carry none, made from the tokens that they have."""

from pathlib import Path

from megatron_7b.errors import ConfigError
from megatron_7b.tokenizer.base import Tokenizer
from megatron_7b.tokenizer.chat_template import has_chat_template

_CHATML = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' -%}
{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{%- else -%}
{{ message['content'] + '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
_NAMED_TURNS = """\
{{- bos_token -}}
{%- for message in messages -%}
<|{{ message['role'] }}|>{{ '\\n' }}
{%- if message['role'] == 'assistant' -%}
{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\\n' }}
{%- else -%}
{{ message['content'] + '\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}
"""


def default_chat_template(tokenizer: Tokenizer) -> str:
    """Return a template: ChatML where the tokenizer has its tokens, else turns that begin with the name of the role.

    Only the assistant's turns end with the token that ends a document, at which generation stops.

    Raises:
        ConfigError: The tokenizer has no token that ends a document.
    """
    names = {tokenizer.spell(token) for token in tokenizer.special_ids}
    if {"<|im_start|>", "<|im_end|>"} <= names:
        return _CHATML
    if tokenizer.eod_id is None:
        raise ConfigError(
            f"the tokenizer {tokenizer.path or tokenizer.kind} has no chat template and no token that ends a document",
            hint="name a tokenizer with one, or write a template into chat_template.jinja beside its files",
        )
    return _NAMED_TURNS


def find_chat_template(tokenizer: Tokenizer, file: Path | None = None) -> str | None:
    """Return the text of a template to use instead of the tokenizer's own: a file's, or the default if it carries none.

    Raises:
        ConfigError: The file cannot be read, or the tokenizer has no token that ends a document.
    """
    if file is None:
        return None if has_chat_template(tokenizer) else default_chat_template(tokenizer)
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the chat template {file} cannot be read: {error}") from error
