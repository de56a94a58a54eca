"""Conversations to be answered: read from a file, spelled out up to where the reply begins."""

import json
from pathlib import Path

from megatron_7b.errors import ConfigError
from megatron_7b.generation.prompts import Prompt
from megatron_7b.tokenizer.chat_template import ChatTemplate, Conversation


def read_conversation(file: Path) -> Conversation:
    """Read a JSON file: a list of messages, or an object with `messages` and perhaps `tools` and `documents`.

    Raises:
        ConfigError: It cannot be read, or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    fields = {"messages": content} if isinstance(content, list) else content
    if not isinstance(fields, dict) or fields.keys() - {"messages", "tools", "documents"} or "messages" not in fields:
        raise ConfigError(
            f"{file} holds neither a list of messages nor an object of messages, tools and documents",
            hint='such as [{"role": "user", "content": "Hello"}]',
        )
    for name, value in fields.items():
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise ConfigError(f"{name} in {file} is no list of objects")
    for message in fields["messages"]:
        if not isinstance(message.get("role"), str):
            raise ConfigError(f"{file}: a message has no role: {json.dumps(message)[:80]}")
    return Conversation(**fields)


def encode_conversation(conversation: Conversation, template: ChatTemplate) -> Prompt:
    """Return a conversation as a prompt, which ends where the reply begins.

    Raises:
        ConfigError: The template refuses the conversation.
    """
    text = template.render(conversation, add_generation_prompt=True)
    return Prompt(text, tuple(template.encode(text)), is_chat=True)
