"""Conversations: spelled out for the model by the chat template that its tokenizer carries, as transformers does it."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_7b.errors import ConfigError
from megatron_7b.generation.prompts import Prompt, read_tokenizer_settings, tokenizer_folder
from megatron_7b.tokenizer import Tokenizer

type Message = Mapping[str, Any]

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which a message carries its reasoning; templates read the first, or the second."""


@dataclass(frozen=True)
class Conversation:
    """What a chat template spells out.

    Attributes:
        messages: With `role` and `content`, the oldest first.
        tools: JSON schemas of functions that the model may call; None: there are none.
        documents: Texts to answer from, with `title` and `text`; None: there are none.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None


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


class ChatTemplate:
    """The template of a tokenizer.

    Args:
        tokenizer: What it belongs to.

    Raises:
        ConfigError: The tokenizer carries none, or one that is no template.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._settings = read_tokenizer_settings(tokenizer)
        self._templates = _find_templates(tokenizer_folder(tokenizer), self._settings.get("chat_template"))
        if not self._templates:
            raise ConfigError(
                f"the tokenizer {tokenizer.path or tokenizer.kind} has no chat template",
                hint="leave --chat out, or name a chat model's tokenizer with --tokenizer DIR",
            )

    def encode(self, conversation: Conversation) -> Prompt:
        """Spell a conversation out up to where the reply begins, and return its tokens.

        Names of special tokens become these tokens, nothing is added at the ends: the template says it all.

        Raises:
            ConfigError: The template refuses the conversation.
        """
        text = self.render(conversation)
        return Prompt(text, tuple(self._encode(text)), is_chat=True)

    def render(self, conversation: Conversation) -> str:
        """Spell a conversation out up to where the reply begins.

        Raises:
            ConfigError: There are no messages, or the template refuses them.
        """
        if not conversation.messages:
            raise ConfigError("the conversation has no messages")
        name = "tool_use" if conversation.tools is not None and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise ConfigError(f"of the chat templates {sorted(self._templates)} none is the default")
        try:
            return _compile(self._templates[name]).render(
                **self._named_tokens(),
                messages=[_normalized(message) for message in conversation.messages],
                tools=conversation.tools,
                documents=conversation.documents,
                add_generation_prompt=True,
            )
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"the chat template is wrong in line {error.lineno}: {error}") from error
        except Exception as error:  # a template is a program, which may fail in any way
            raise ConfigError(f"the chat template cannot be applied to the messages: {error}") from error

    def _named_tokens(self) -> dict[str, str]:
        values = {name: self._settings.get(name) for name in _NAMED_TOKENS}
        contents = {name: value.get("content") if isinstance(value, dict) else value for name, value in values.items()}
        return {name: content for name, content in contents.items() if isinstance(content, str)}

    def _encode(self, text: str) -> list[int]:
        """Encode; libraries other than tokenizers take the name of a special token for ordinary text."""
        if self._tokenizer.kind == "hugging_face":
            return self._tokenizer.encode(text)
        ids_of_roles = {
            "bos_token": self._tokenizer.bos_id,
            "eos_token": self._tokenizer.eod_id,
            "pad_token": self._tokenizer.pad_id,
        }
        named = {
            name: ids_of_roles[role]
            for role, name in self._named_tokens().items()
            if ids_of_roles.get(role) is not None
        }
        if not named:
            return self._tokenizer.encode(text)
        parts = re.split("(" + "|".join(map(re.escape, sorted(named, key=len, reverse=True))) + ")", text)
        encoded = ([named[part]] if part in named else self._tokenizer.encode(part) for part in parts if part)
        return [token for part in encoded for token in part if token is not None]


def _find_templates(folder: Path | None, setting: object) -> dict[str, str]:
    """Templates by name: those of files, or else those of tokenizer_config.json."""
    if folder is None:
        return {}
    files = {file.stem: file for file in (folder / "additional_chat_templates").glob("*.jinja")}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    if files:
        return {name: file.read_text(encoding="utf-8") for name, file in files.items()}
    if isinstance(setting, str):
        return {"default": setting}
    entries = setting if isinstance(setting, list) else []
    return {str(entry.get("name")): str(entry.get("template")) for entry in entries if isinstance(entry, dict)}


def _normalized(message: Message) -> dict[str, Any]:
    """A message without empty fields, its reasoning under the names that templates read."""
    fields = {name: value for name, value in message.items() if value is not None}
    reasoning = next((fields[name] for name in _REASONING if name in fields), None)
    return fields if reasoning is None else {"thinking": reasoning, **fields, "reasoning_content": reasoning}


def _compile(template: str) -> jinja2.Template:
    """Compile a template that may come from anywhere: it sees plain data, and can change nothing."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda spelling: datetime.now().strftime(spelling)  # noqa: DTZ005  # local time
    return environment.from_string(template)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models have read it: jinja's own filter escapes the characters of HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


class _GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}` marks the model's own words for training, and changes nothing here."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        """Read the tag and what it holds."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_words"), [], [], body).set_lineno(line)

    def _words(self, caller: Any) -> str:
        return str(caller())
