"""The process of the program: it runs what was written, then does what the judge asks of its functions.

Everything here may be changed or replaced by the program, which can do no more than answer wrongly.
"""

import json
import os
import sys
from typing import Any

from megatron_7b.runtime.confinement.inside import begin
from megatron_7b.runtime.confinement.messages import Channel, ChannelClosed, pack, unpack


class _Objects:
    """What stays here, by number."""

    def __init__(self) -> None:
        self._objects: list[object] = []

    def keep(self, value: object) -> int:
        self._objects.append(value)
        return len(self._objects) - 1

    def find(self, number: int) -> Any:
        return self._objects[number]


def main() -> None:
    """Run the task that standard input holds; the channel to the judge is the file descriptor that it names."""
    task = json.loads(sys.stdin.buffer.read())
    os.close(begin(task))  # nothing but the channel leads outside
    channel, objects = Channel(task["channel"]), _Objects()
    namespace: dict[str, Any] = {"__name__": "program"}
    try:
        exec(compile(task["program"], "program", "exec"), namespace)  # noqa: S102  # what this module is for
        channel.send(["done", None])
    except BaseException as error:  # noqa: BLE001  # SystemExit, too
        channel.send(["raised", type(error).__name__, _text(error)])
    while True:
        try:
            request = channel.receive()
        except ChannelClosed:
            return
        channel.send(_answer(request, namespace, objects))


def _answer(request: list[Any], namespace: dict[str, Any], objects: _Objects) -> list[Any]:
    try:
        kind, subject, *rest = request
        if kind == "name":
            if subject not in namespace:
                return ["raised", "NameError", f"name {subject!r} is not defined"]
            return ["done", pack(namespace[subject], objects.keep)]
        target = objects.find(subject)
        given = [unpack(one, objects.find) for one in rest]
        return ["done", *_DOES[kind](target, given, objects)]
    except BaseException as error:  # noqa: BLE001  # SystemExit, too
        return ["raised", type(error).__name__, _text(error)]


def _call(target: Any, given: list[Any], objects: _Objects) -> list[Any]:
    arguments, named = given
    result = target(*arguments, **named)
    # What a function did to its arguments belongs to what it did.
    return [pack(result, objects.keep), pack(list(arguments), objects.keep)]


def _text(error: BaseException) -> str:
    try:
        return str(error)[:500]
    except BaseException:  # noqa: BLE001  # an error of the program, whose __str__ may do anything
        return ""


_DOES: dict[str, Any] = {
    "call": _call,
    "attribute": lambda target, given, objects: [pack(getattr(target, *given), objects.keep)],
    "item": lambda target, given, objects: [pack(target[given[0]], objects.keep)],
    "items": lambda target, _, objects: [pack(list(target), objects.keep)],
    "length": lambda target, _, objects: [pack(len(target), objects.keep)],
    "text": lambda target, _, objects: [pack(str(target), objects.keep)],
}
