"""The process of the tests: it calls the functions of the program, which are in another process, and compares.

Only this process knows the tests, and only it says whether they pass. What a function returns arrives as a copy made of
Python's own types, so that no object of the program takes part in a comparison.
"""

import builtins
import importlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

from megatron_7b.runtime.confinement.inside import begin
from megatron_7b.runtime.confinement.messages import Channel, ChannelClosed, pack, unpack


class _ProgramEnded(BaseException):
    """The program wanted to end in the midst of its work."""


class _Program:
    """The program, as the tests can reach it."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._ending: ChannelClosed | None = None

    def check_is_there(self) -> None:
        """Refuse to let a program pass that has ended while tests caught whatever was raised.

        Raises:
            ChannelClosed: It has.
        """
        if self._ending is not None:
            raise self._ending

    def ask(self, kind: str, subject: object, *given: object) -> list[Any]:
        """Have the program do something.

        Raises:
            Exception: What it raised, if it is of Python's own errors; RuntimeError for others.
            _ProgramEnded: It raised what ends a program.
            ChannelClosed: It has ended.
        """
        message = [kind, subject, *(pack(one, self._number) for one in given)]
        try:
            self._channel.send(message)
            return self.answer()
        except ChannelClosed as error:
            self._ending = error
            raise

    def answer(self) -> list[Any]:
        """Wait for what the program says; raises as `ask`."""
        said = self._channel.receive()
        if not isinstance(said, list) or not said or said[0] not in ("done", "raised"):
            raise ChannelClosed("the other process sends no answers")
        if said[0] == "done":
            return [unpack(one, self._stand_in) for one in said[1:]]
        name, text = (str(one) for one in said[1:3])
        kind = getattr(builtins, name, None)
        if not isinstance(kind, type) or not issubclass(kind, BaseException):
            raise RuntimeError(f"{name}: {text}")
        if not issubclass(kind, Exception):
            raise _ProgramEnded(f"{name}: {text}")
        if issubclass(kind, StopIteration | StopAsyncIteration):  # would end a `map` over the tests' own examples
            raise RuntimeError(f"{name}: {text}")
        try:
            error = kind(text)
        except TypeError:  # such as UnicodeDecodeError, which takes more
            error = RuntimeError(f"{name}: {text}")
        raise error

    def _stand_in(self, number: int) -> "_StandIn":
        return _StandIn(self, number)

    @staticmethod
    def _number(value: object) -> int:
        if isinstance(value, _StandIn):
            return value.number_there
        raise TypeError(f"a {type(value).__name__} cannot be given to the program, only values and what it returned")


class _StandIn:
    """Stands for an object of the program that cannot be copied, such as a function; equal to itself alone."""

    def __init__(self, program: _Program, number: int) -> None:
        self._program_there = program
        self.number_there = number

    def _ask(self, kind: str, *given: object) -> list[Any]:
        return self._program_there.ask(kind, self.number_there, *given)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        result, changed = self._ask("call", list(arguments), named)
        for before, after in zip(arguments, changed, strict=True):
            if type(before) is type(after) and isinstance(before, list | bytearray):
                before[:] = after
            elif type(before) is type(after) and isinstance(before, dict | set):
                before.clear()
                before.update(after)
        return result

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask("attribute", name)[0]

    def __getitem__(self, key: object) -> Any:
        return self._ask("item", key)[0]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._ask("items")[0])

    def __len__(self) -> int:
        return int(self._ask("length")[0])

    def __str__(self) -> str:
        return str(self._ask("text")[0])


def main() -> None:
    """Judge the task that standard input holds, and write the verdict to standard output as JSON."""
    task = json.loads(sys.stdin.buffer.read())
    told = begin(task)
    try:
        judge(task, _Program(Channel(task["channel"])))
        verdict = {"passed": True, "result": "passed"}
    except BaseException as error:  # noqa: BLE001  # SystemExit of a test, too
        text = _printable(str(error)[:300])
        verdict = {
            "passed": False,
            "result": f"failed: {type(error).__name__.lstrip('_')}" + (f": {text}" if text else ""),
        }
    os.write(told, json.dumps(verdict).encode() + b"\n")
    os._exit(0)  # nothing that tests have left behind has a say


def _printable(text: str) -> str:
    """Return a text of a program for a line of a terminal or file, without what would steer these."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


def judge(task: dict[str, Any], program: _Program) -> None:
    """Run the tests of a task.

    Args:
        task: `prelude` is text of the problem that tests may use, `names` what they take from the program, `tests` the
            tests.
        program: The program.

    Raises:
        BaseException: They do not pass.
    """
    program.answer()  # it has run without an error
    namespace: dict[str, Any] = {"__name__": "tests"}
    exec(compile(task["prelude"], "problem", "exec"), namespace)  # noqa: S102  # the user's own file
    for name in task["names"]:
        if name in sys.stdlib_module_names:
            namespace[name] = importlib.import_module(name)
        else:
            namespace[name] = program.ask("name", name)[0]
    exec(compile(task["tests"], "tests", "exec"), namespace)  # noqa: S102
    program.check_is_there()
