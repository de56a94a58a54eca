"""The formats of preferences, each turned into exchanges: a prompt, and a reply to it.

| a record | learned with |
|---|---|
| `{"prompt": …, "chosen": …, "rejected": …}` | any loss; kto takes it for two labelled replies |
| `{"prompt": …, "completion": …, "label": true}` | kto |

Prompts and replies are texts, or lists of messages with `role` and `content`. `prompt` may be left out if `chosen` and
`rejected` both begin with it. Keys that a format does not know are left alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

from megatron_7b.data.conversations.formats import WeightedConversation, read_record
from megatron_7b.data.records.reading import RecordError, text_of

type Messages = tuple[Mapping[str, Any], ...]
type Form = Literal["texts", "messages"]

_SAME = "chosen and rejected are the same"
_REPLY_ROLES = ("assistant", "tool", "ipython")


@dataclass(frozen=True)
class Exchange:
    """A prompt and a reply to it.

    Attributes:
        prompt: A text, or messages.
        reply: The same.
        tools: JSON schemas of functions that the model may call; only with messages.
    """

    prompt: str | Messages
    reply: str | Messages
    tools: Sequence[Mapping[str, Any]] | None = None

    @property
    def form(self) -> Form:
        """What prompt and reply are."""
        return "texts" if isinstance(self.prompt, str) else "messages"

    def conversation(self) -> WeightedConversation:
        """Return prompt and reply as one conversation, of which only the reply counts.

        Raises:
            RecordError: A message lacks something, has a role that nobody knows, or is empty.
        """
        assert not isinstance(self.prompt, str)
        assert not isinstance(self.reply, str)
        messages = [{**message, "weight": 0} for message in self.prompt]
        messages += [{**message, "weight": None} for message in self.reply]
        return read_record({"messages": messages, "tools": self.tools}, "messages")


@dataclass(frozen=True)
class Pair:
    """Two replies to one prompt."""

    chosen: Exchange
    rejected: Exchange


@dataclass(frozen=True)
class Labelled:
    """A reply that is wanted or not."""

    exchange: Exchange
    is_desirable: bool


def read_preference(record: Mapping[str, Any]) -> Pair | Labelled:
    """Turn a record into exchanges.

    Raises:
        RecordError: A key is missing, a reply is empty, both replies are the same, their prompts differ, or messages
            cannot be used.
    """
    if "chosen" in record or "rejected" in record:
        return _read_pair(record)
    if "completion" in record or "label" in record:
        return _read_labelled(record)
    raise RecordError(
        f"its keys are {sorted(record)}, expected 'prompt', 'chosen' and 'rejected', or 'prompt', 'completion' and "
        "'label'"
    )


def _read_pair(record: Mapping[str, Any]) -> Pair:
    chosen, rejected = _reply_of(record, "chosen"), _reply_of(record, "rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RecordError(f"chosen is {_kind(chosen)}, rejected is {_kind(rejected)}")
    if chosen == rejected:
        raise RecordError(_SAME)
    if isinstance(chosen, str) and isinstance(rejected, str):
        if record.get("prompt") is None:
            prompt, chosen, rejected = _split_texts(chosen, rejected)
        else:
            prompt = _text_prompt(record, "chosen")
        return Pair(Exchange(prompt, chosen), Exchange(prompt, rejected))
    assert not isinstance(chosen, str)
    assert not isinstance(rejected, str)
    before, chosen, rejected = _split_messages(record, chosen, rejected)
    if chosen == rejected:
        raise RecordError(_SAME)
    before, tools = _with_system(record, before), _tools(record)
    return Pair(
        _checked(Exchange(before, chosen, tools), "chosen"), _checked(Exchange(before, rejected, tools), "rejected")
    )


def _read_labelled(record: Mapping[str, Any]) -> Labelled:
    label = record.get("label")
    if not isinstance(label, bool):
        found = "no 'label'" if label is None else f"the label {label!r}"
        raise RecordError(f"it has {found}, expected true (a reply that is wanted) or false")
    reply = _reply_of(record, "completion")
    if isinstance(reply, str):
        return Labelled(Exchange(_text_prompt(record, "completion"), reply), label)
    prompt = _messages_prompt(record)
    if prompt is None:
        raise RecordError(f"it has no 'prompt'; its keys are {sorted(record)}")
    exchange = Exchange(_with_system(record, _without(prompt, reply, "completion")[0]), reply, _tools(record))
    return Labelled(_checked(exchange, "completion"), label)


def _reply_of(record: Mapping[str, Any], key: str) -> str | Messages:
    value = record.get(key)
    if isinstance(value, list):
        if not value or not all(isinstance(message, dict) for message in value):
            raise RecordError(f"{key!r} is {'empty' if not value else 'not a list of messages'}")
        return tuple(value)
    return text_of(dict(record), key)


def _text_prompt(record: Mapping[str, Any], reply: str) -> str:
    if isinstance(record.get("prompt"), list):
        raise RecordError(f"prompt is a list of messages, {reply} is a text: write the reply as a list of messages too")
    if record.get("system") is not None:
        raise RecordError("a 'system' goes with messages: texts are taken as they are")
    return text_of(dict(record), "prompt")


def _messages_prompt(record: Mapping[str, Any]) -> Messages | None:
    """Return the prompt that a record with messages names; None if it names none."""
    prompt = record.get("prompt")
    if prompt is None:
        return None
    if isinstance(prompt, str):
        return ({"role": "user", "content": text_of(dict(record), "prompt")},)
    if not isinstance(prompt, list) or not prompt or not all(isinstance(message, dict) for message in prompt):
        raise RecordError("'prompt' is neither a text nor a list of messages")
    return tuple(prompt)


def _split_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Return the prompt that two texts begin with, and what each has after it.

    Source: trl's `extract_prompt`: the space before the first different word belongs to the replies.
    """
    length = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False)))
    length -= length > 0 and chosen[length - 1] == " "
    prompt, replies = chosen[:length], (chosen[length:], rejected[length:])
    if not prompt.strip():
        raise RecordError("it has no 'prompt', and chosen and rejected do not begin with the same text")
    for name, reply in zip(("chosen", "rejected"), replies, strict=True):
        if not reply.strip():
            raise RecordError(f"it has no 'prompt', and {name} is nothing but what both begin with")
    return prompt, *replies


def _split_messages(record: Mapping[str, Any], chosen: Messages, rejected: Messages) -> tuple[Messages, ...]:
    """Return the messages of the prompt, and those of each reply."""
    named = _messages_prompt(record)
    if named is None or (isinstance(record["prompt"], str) and chosen[0].get("role") != "assistant"):
        same = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False)))
        prompt = chosen[:same]
        if not prompt:
            raise RecordError("chosen and rejected do not begin with the same message: the prompts differ")
        if named is not None and named[0]["content"] not in (message.get("content") for message in prompt):
            raise RecordError("the messages of chosen and rejected do not begin with 'prompt'")
        return prompt, chosen[same:], rejected[same:]
    prompt, chosen = _without(named, chosen, "chosen")
    return prompt, chosen, _without(named, rejected, "rejected")[1]


def _without(prompt: Messages, reply: Messages, name: str) -> tuple[Messages, Messages]:
    """Return prompt and reply, where the messages of the reply may begin with those of the prompt."""
    reply = reply[len(prompt) :] if reply[: len(prompt)] == prompt else reply
    if not reply:
        raise RecordError(f"{name} is nothing but the prompt")
    return prompt, reply


def _checked(exchange: Exchange, name: str) -> Exchange:
    """Check the messages of a prompt and a reply.

    Raises:
        RecordError: See `Exchange.conversation`; or the reply does not begin with the assistant's words.
    """
    assert not isinstance(exchange.reply, str)
    if not exchange.reply:
        raise RecordError(f"{name} is nothing but the prompt")
    role = exchange.reply[0].get("role")
    if role in ("user", "system", "developer"):
        raise RecordError(
            f"the reply of {name} begins with the role {role!r}, expected 'assistant': do the prompts differ?"
        )
    try:
        messages = exchange.conversation().conversation.messages
    except RecordError as error:
        raise RecordError(f"{name}: {error}") from None
    if messages[-1]["role"] not in _REPLY_ROLES:
        raise RecordError(f"{name} ends with a message of the role {messages[-1]['role']!r}, expected 'assistant'")
    return exchange


def _with_system(record: Mapping[str, Any], prompt: Messages) -> Messages:
    system = record.get("system")
    return prompt if not system else ({"role": "system", "content": text_of(dict(record), "system")}, *prompt)


def _tools(record: Mapping[str, Any]) -> Sequence[Mapping[str, Any]] | None:
    tools = record.get("tools")
    if tools is not None and (not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools)):
        raise RecordError("tools is not a list of objects")
    return tools or None


def _kind(value: str | Messages) -> str:
    return "a text" if isinstance(value, str) else "a list of messages"
