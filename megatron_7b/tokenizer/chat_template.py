"""Conversations: spelled out for the model by the chat template that its tokenizer carries, as transformers does it."""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_7b.errors import ConfigError
from megatron_7b.tokenizer.base import Tokenizer, hash_identity
from megatron_7b.tokenizer.settings import read_tokenizer_settings, tokenizer_folder

type Message = Mapping[str, Any]

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
START_MARK, STOP_MARK = "\ue000", "\ue001"
"""Characters of Unicode's private use area, which no text to learn from contains."""
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


class ChatTemplate:
    """The template of a tokenizer.

    Args:
        tokenizer: What it belongs to.
        source: Text of a template to use instead of the one that the tokenizer carries.

    Raises:
        ConfigError: The tokenizer carries none, or one that is no template.
    """

    def __init__(self, tokenizer: Tokenizer, source: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._settings = read_tokenizer_settings(tokenizer)
        self._templates = {"default": source} if source is not None else _find_templates(tokenizer)
        if not self._templates:
            raise ConfigError(
                f"the tokenizer {tokenizer.path or tokenizer.kind} has no chat template",
                hint="leave --chat out, or name a chat model's tokenizer with --tokenizer DIR",
            )

    @property
    def marks_replies(self) -> bool:
        """Whether it says itself, by `{% generation %}`, what the model's own words are."""
        return any(re.search(r"\{%-?\s*generation\b", template) for template in self._templates.values())

    @property
    def default_source(self) -> str | None:
        """Text of the template that is used unless tools ask for another one; None: there is none."""
        return self._templates.get("default")

    @property
    def identity(self) -> str:
        """Hash of what decides how a conversation is spelled out."""
        return hash_identity(
            "chat template", json.dumps([self._templates, self._named_tokens()], sort_keys=True).encode()
        )

    def render(self, conversation: Conversation, *, add_generation_prompt: bool = True) -> str:
        """Spell a conversation out.

        Args:
            conversation: What to spell out.
            add_generation_prompt: Go on to where the reply begins.

        Raises:
            ConfigError: There are no messages, or the template refuses them.
        """
        return self._render(conversation, add_generation_prompt, marks=False)

    def render_marked(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]] | None:
        """Spell a conversation out, and say which parts of the text `{% generation %}` marks.

        Returns:
            The text, and where each part starts and stops in it; None if the template changes what it has marked.

        Raises:
            ConfigError: There are no messages, or the template refuses them.
        """
        plain = self._render(conversation, add_generation_prompt=False, marks=False)
        pieces = re.split(f"([{START_MARK}{STOP_MARK}])", self._render(conversation, False, marks=True))
        text, spans, start = "", [], None
        for piece in pieces:
            if piece == START_MARK and start is None:
                start = len(text)
            elif piece == STOP_MARK and start is not None:
                spans.append((start, len(text)))
                start = None
            else:
                text += piece
        return (text, spans) if text == plain and start is None else None

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text that was spelled out.

        Names of special tokens become these tokens, nothing is added at the ends: the template says it all.
        """
        return [token for part in self._split(text) for token in self._encode_part(*part)[0]]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the tokens of a text that was spelled out, and where each starts and stops in it, in characters."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        position = 0
        for part in self._split(text):
            part_ids, part_offsets = self._encode_part(*part)
            ids += part_ids
            offsets += [(position + start, position + stop) for start, stop in part_offsets]
            position += len(part[0])
        return ids, offsets

    def _render(self, conversation: Conversation, add_generation_prompt: bool, *, marks: bool) -> str:
        if not conversation.messages:
            raise ConfigError("the conversation has no messages")
        name = "tool_use" if conversation.tools is not None and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise ConfigError(f"of the chat templates {sorted(self._templates)} none is the default")
        try:
            return _compile(self._templates[name], marks=marks).render(
                **self._named_tokens(),
                messages=[_normalized(message) for message in conversation.messages],
                tools=conversation.tools,
                documents=conversation.documents,
                add_generation_prompt=add_generation_prompt,
            )
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"the chat template is wrong in line {error.lineno}: {error}") from error
        except Exception as error:  # a template is a program, which may fail in any way
            raise ConfigError(f"the chat template cannot be applied to the messages: {error}") from error

    def _named_tokens(self) -> dict[str, str]:
        """Return the names of special tokens from the settings, or from the tokenizer if there are none."""
        values = {name: self._settings.get(name) for name in _NAMED_TOKENS}
        contents = {name: value.get("content") if isinstance(value, dict) else value for name, value in values.items()}
        if not any(contents.values()):
            known = self._ids_of_roles()
            contents = {role: None if token is None else self._tokenizer.spell(token) for role, token in known.items()}
        return {name: content for name, content in contents.items() if isinstance(content, str)}

    def _ids_of_roles(self) -> dict[str, int | None]:
        tokenizer = self._tokenizer
        return {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eod_id, "pad_token": tokenizer.pad_id}

    def _split(self, text: str) -> list[tuple[str, int | None]]:
        """Cut a text into parts, each with its id if it is the name of a special token that the library cannot see.

        Libraries other than tokenizers take such a name for ordinary text.
        """
        if self._tokenizer.kind == "hugging_face":
            return [(text, None)]
        ids_of_roles = self._ids_of_roles()
        named = {
            name: ids_of_roles[role]
            for role, name in self._named_tokens().items()
            if ids_of_roles.get(role) is not None
        }
        if not named:
            return [(text, None)]
        parts = re.split("(" + "|".join(map(re.escape, sorted(named, key=len, reverse=True))) + ")", text)
        return [(part, named.get(part)) for part in parts if part]

    def _encode_part(self, text: str, token: int | None) -> tuple[list[int], list[tuple[int, int]]]:
        return self._tokenizer.encode_with_offsets(text) if token is None else ([token], [(0, len(text))])


def has_chat_template(tokenizer: Tokenizer) -> bool:
    """Return whether a tokenizer carries a template."""
    return bool(_find_templates(tokenizer))


def _find_templates(tokenizer: Tokenizer) -> dict[str, str]:
    """Templates by name: those of files, or else those of tokenizer_config.json."""
    folder, setting = tokenizer_folder(tokenizer), read_tokenizer_settings(tokenizer).get("chat_template")
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
    """Return a message without empty fields, its reasoning under the names that templates read."""
    fields = {name: value for name, value in message.items() if value is not None}
    reasoning = next((fields[name] for name in _REASONING if name in fields), None)
    return fields if reasoning is None else {"thinking": reasoning, **fields, "reasoning_content": reasoning}


@functools.lru_cache(maxsize=32)
def _compile(template: str, *, marks: bool) -> jinja2.Template:
    """Compile a template that may come from anywhere: it sees plain data, and can change nothing."""
    tag = _MarkingGenerationTag if marks else _GenerationTag
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[tag, "jinja2.ext.loopcontrols"]
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


class _MarkingGenerationTag(_GenerationTag):
    """Puts marks around what the tag holds."""

    def _words(self, caller: Any) -> str:
        return START_MARK + str(caller()) + STOP_MARK
