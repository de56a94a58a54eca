"""Plain values between a program and its judge: nothing that is read runs anything.

Values of Python's own types are copied, by their real content whatever a subclass of theirs claims; all else stays
where it is and is referred to by a number.
"""

import json
import os
from collections.abc import Callable, Iterable
from typing import Any

MAX_MESSAGE_BYTES = 8 * 2**20

type Keep = Callable[[object], int]
"""Keeps an object and gives its number."""
type Find = Callable[[int], Any]
"""Gives what stands for an object that the other side keeps."""


class ChannelClosed(BaseException):
    """The other side is gone, or says what nobody understands. No `except Exception` of a test hides it."""


class Channel:
    """Messages in both directions over a socket that was inherited."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def send(self, message: object) -> None:
        """Send what JSON can hold.

        Raises:
            ChannelClosed: Nobody is there, or the message is too long.
        """
        content = json.dumps(message).encode()
        if len(content) > MAX_MESSAGE_BYTES:
            raise ChannelClosed(f"a value is too large: {len(content):,} bytes")
        content = len(content).to_bytes(8, "big") + content
        try:
            while content:
                content = content[os.write(self._descriptor, content) :]
        except OSError as error:
            raise ChannelClosed("the other process has ended") from error

    def receive(self) -> Any:
        """Wait for a message.

        Raises:
            ChannelClosed: Nobody is there, or what came is no message.
        """
        length = int.from_bytes(self._read(8), "big")
        if length > MAX_MESSAGE_BYTES:
            raise ChannelClosed(f"a value is too large: {length:,} bytes")
        try:
            return json.loads(self._read(length))
        except (ValueError, RecursionError) as error:
            raise ChannelClosed("the other process sends no values") from error

    def _read(self, length: int) -> bytes:
        parts = b""
        while len(parts) < length:
            try:
                part = os.read(self._descriptor, length - len(parts))
            except OSError as error:
                raise ChannelClosed("the other process has ended") from error
            if not part:
                raise ChannelClosed("the other process has ended")
            parts += part
        return parts


_COPIED: dict[type, Callable[[Any], Iterable[object] | str]] = {
    list: list.__iter__,
    tuple: tuple.__iter__,
    set: set.__iter__,
    frozenset: frozenset.__iter__,
    bytes: bytes.hex,
    bytearray: bytearray.hex,
}
"""How the content of a value is had without asking the value's own methods."""


def pack(value: object, keep: Keep) -> Any:
    """Return a value as JSON can hold it; `keep` takes what cannot be copied."""
    if value is None or value is True or value is False:
        return value
    if isinstance(value, int):
        return {"int": hex(int.__index__(value))}  # decimal digits of a long number would take quadratic time
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, dict):
        return {"dict": [[pack(key, keep), pack(one, keep)] for key, one in dict.items(value)]}
    for kind, copied in _COPIED.items():
        if isinstance(value, kind):
            content = copied(value)
            return {kind.__name__: content if isinstance(content, str) else [pack(one, keep) for one in content]}
    if type(value) is complex:
        return {"complex": [value.real, value.imag]}
    if type(value) is range:
        return {"range": [hex(value.start), hex(value.stop), hex(value.step)]}
    return {"object": keep(value)}


def unpack(packed: Any, find: Find) -> Any:
    """Return the value that `pack` has packed.

    Raises:
        ChannelClosed: It is none.
    """
    if not isinstance(packed, dict):
        if isinstance(packed, str | float | bool) or packed is None:
            return packed
        raise ChannelClosed("the other process sends no values")
    try:
        ((kind, content),) = packed.items()
        return _UNPACKED[kind](content, find)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ChannelClosed("the other process sends no values") from error


def _all(content: list[Any], find: Find) -> list[Any]:
    return [unpack(one, find) for one in content]


_UNPACKED: dict[str, Callable[[Any, Find], Any]] = {
    "int": lambda content, _: int(content, 16),
    "list": _all,
    "tuple": lambda content, find: tuple(_all(content, find)),
    "set": lambda content, find: set(_all(content, find)),
    "frozenset": lambda content, find: frozenset(_all(content, find)),
    "dict": lambda content, find: {unpack(key, find): unpack(one, find) for key, one in content},
    "bytes": lambda content, _: bytes.fromhex(content),
    "bytearray": lambda content, _: bytearray.fromhex(content),
    "complex": lambda content, _: complex(*content),
    "range": lambda content, _: range(*(int(one, 16) for one in content)),
    "object": lambda content, find: find(int(content)),
}
