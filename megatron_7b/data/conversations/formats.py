"""The formats that conversations come in, each turned into messages with roles and contents.

| format | a record |
|---|---|
| messages | `{"messages": [{"role": "user", "content": …}, …], "tools": […]}` |
| sharegpt | `{"conversations": [{"from": "human", "value": …}, …], "system": …}` |
| alpaca | `{"instruction": …, "input": …, "output": …, "system": …, "history": [[question, answer], …]}` |
| prompt | `{"prompt": …, "completion": …}`, both texts or both lists of messages |

Keys that a format does not know are left alone: data sets carry identifiers and notes.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_7b.data.records.reading import RecordError, has_half_pair
from megatron_7b.tokenizer.chat_template import Conversation

type Format = Literal["messages", "sharegpt", "alpaca", "prompt"]

ROLES = ("system", "developer", "user", "assistant", "tool", "ipython")
"""Roles that a message may have; what a template makes of them is its own affair."""

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class WeightedConversation:
    """A conversation, and how much each of its messages counts.

    Attributes:
        conversation: Messages, and tools if it has any.
        weights: One per message, as the record gives it; None where it gives none.
    """

    conversation: Conversation
    weights: tuple[float | None, ...]


def find_format(record: Mapping[str, Any]) -> Format:
    """Return the format that a record's keys belong to.

    Raises:
        RecordError: They belong to none, or to several.
    """
    found = [name for name, keys in _KEYS.items() if all(key in record for key in keys)]
    if len(found) == 1:
        return found[0]
    if found:
        raise RecordError(f"it has the keys of several formats: {', '.join(found)}")
    expected = "; ".join(" and ".join(map(repr, keys)) for keys in _KEYS.values())
    missing = _nearly_there(record)
    raise RecordError(missing or f"its keys are {sorted(record)}, expected {expected}")


def read_record(record: Mapping[str, Any], form: Format) -> WeightedConversation:
    """Turn a record into a conversation.

    Args:
        record: As JSON has it.
        form: What `find_format` says of it.

    Raises:
        RecordError: A message lacks something, has a role that nobody knows, or is empty; or no message is the
            assistant's.
    """
    messages = _READERS[form](record)
    if not messages:
        raise RecordError("it has no messages")
    checked, weights = [], []
    for number, message in enumerate(messages, start=1):
        fields, weight = _checked(message, f"message {number}")
        checked.append(fields)
        weights.append(weight)
    if all(message["role"] != "assistant" for message in checked):
        raise RecordError("no message is the assistant's, so that there is nothing to learn from it")
    return WeightedConversation(Conversation(checked, tools=_tools(record)), tuple(weights))


def _from_messages(record: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return _list_of_objects(record["messages"], "messages")


def _from_sharegpt(record: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    turns = _list_of_objects(record["conversations"], "conversations")
    messages = []
    for number, turn in enumerate(turns, start=1):
        where = f"conversations[{number - 1}]"
        role = _text(turn, "from", where) if "from" in turn else _text(turn, "role", where)
        if role not in _SHAREGPT_ROLES:
            raise RecordError(f"{where} is from {role!r}, expected {', '.join(_SHAREGPT_ROLES)}{_guess(role)}")
        content = turn.get("value", turn.get("content"))
        weight = {"weight": turn["weight"]} if "weight" in turn else {}
        messages.append({"role": _SHAREGPT_ROLES[role], "content": content, **weight})
    return _with_system(record, messages)


def _from_alpaca(record: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    messages = []
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise RecordError("history is not a list of [question, answer]")
    for question, answer in history:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    question = _text(record, "instruction", "it")
    if record.get("input"):
        question += "\n" + _text(record, "input", "it")
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": record["output"]}]
    return _with_system(record, messages)


def _from_prompt(record: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return _with_system(record, [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}])
    if isinstance(prompt, list) and isinstance(completion, list):
        before, after = _list_of_objects(prompt, "prompt"), _list_of_objects(completion, "completion")
        return [*({"weight": 0, **message} for message in before), *after]
    raise RecordError("prompt and completion are neither two texts nor two lists of messages")


_KEYS: Mapping[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt": ("prompt", "completion"),
}
_READERS: Mapping[Format, Callable[[Mapping[str, Any]], Sequence[Mapping[str, Any]]]] = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "prompt": _from_prompt,
}


def _checked(message: Mapping[str, Any], where: str) -> tuple[dict[str, Any], float | None]:
    """Return the fields that a template sees, and the weight."""
    fields = {name: value for name, value in message.items() if name != "weight"}
    role = _text(fields, "role", where)
    if role not in ROLES:
        raise RecordError(f"{where} has the role {role!r}, expected {', '.join(ROLES)}{_guess(role)}")
    has_calls = role == "assistant" and bool(fields.get("tool_calls"))
    content = fields.get("content")
    if isinstance(content, list):
        content = "".join(_text_of_part(part, where) for part in content)
    if content is None and has_calls:
        content = ""
    if not isinstance(content, str):
        found = "no content" if content is None else f"a content of type {type(content).__name__}"
        raise RecordError(f"{where} ({role}) has {found}, expected a text")
    if has_half_pair(content):
        raise RecordError(f"{where} ({role}) has half of a surrogate pair, which is no character")
    if not content.strip() and not has_calls:
        raise RecordError(f"{where} ({role}) is empty")
    return {**fields, "content": content}, _weight(message, where)


def _weight(message: Mapping[str, Any], where: str) -> float | None:
    weight = message.get("weight")
    if weight is None:
        return None
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
        raise RecordError(f"{where} has the weight {weight!r}, expected a number from 0 on")
    return float(weight)


def _text_of_part(part: object, where: str) -> str:
    match part:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": str(kind)}:
            raise RecordError(f"{where} has a part of type {kind!r}, expected text")
    raise RecordError(f"{where} has a part that is not an object of type and text")


def _tools(record: Mapping[str, Any]) -> Sequence[Mapping[str, Any]] | None:
    tools = record.get("tools")
    return None if not tools else _list_of_objects(tools, "tools")


def _with_system(record: Mapping[str, Any], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"role": "system", "content": record["system"]}, *messages] if record.get("system") else messages


def _list_of_objects(value: object, name: str) -> Sequence[Mapping[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise RecordError(f"{name} is not a list of objects")
    return value


def _text(fields: Mapping[str, Any], key: str, where: str) -> str:
    value = fields.get(key)
    if not isinstance(value, str):
        found = f"no {key!r}" if value is None else f"{key!r} of type {type(value).__name__}"
        raise RecordError(f"{where} has {found}, expected a text")
    return value


def _guess(role: str) -> str:
    close = difflib.get_close_matches(role.lower(), (*ROLES, *_SHAREGPT_ROLES), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _nearly_there(record: Mapping[str, Any]) -> str | None:
    """Say which key is missing where others of a format are there."""
    for name, keys in _KEYS.items():
        missing = [key for key in keys if key not in record]
        if len(missing) < len(keys):
            return f"it has no {missing[0]!r}, which the format {name} needs beside {', '.join(keys[:1])}"
    return None
