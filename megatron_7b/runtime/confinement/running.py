"""The outside: starts a program and its judge, waits as long as they may take, and says how it went."""

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

import megatron_7b
from megatron_7b.errors import ConfigError
from megatron_7b.runtime.confinement.inside import Isolation

_MAX_VERDICT_BYTES = 64 * 1024
_START_SECONDS = 20.0
"""What both processes may take to start, beyond the time of the program."""


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        seconds: Of time, and of one core.
        memory_bytes: Of address space.
        must_isolate: Refuse to run anything if the machine cannot keep it from network, files and processes.
    """

    seconds: float = 10.0
    memory_bytes: int = 2**30
    must_isolate: bool = True

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: One is out of range.
        """
        if not 0 < self.seconds <= 3600:
            raise ConfigError(f"a program may take {self.seconds} seconds, expected more than 0 and at most 3600")
        if self.memory_bytes < 128 * 2**20:
            raise ConfigError(f"a program may use {self.memory_bytes:,} bytes, expected at least 128 MiB")


@dataclass(frozen=True)
class ProgramTests:
    """What judges a program.

    Attributes:
        code: Python that raises if the program is wrong.
        names: What it takes from the program.
        prelude: Python that comes first, of the problem; it may define what the tests use.
    """

    code: str
    names: tuple[str, ...]
    prelude: str = ""


@dataclass(frozen=True)
class Verdict:
    """How a program did.

    Attributes:
        passed: All tests passed.
        result: `passed`, `timed out`, or `failed: ` and why.
    """

    passed: bool
    result: str


def run_program(program: str, tests: ProgramTests, limits: Limits | None = None) -> Verdict:
    """Run a program and its tests, each in a confined process.

    Args:
        program: Python source that defines what the tests take from it. It has the standard library and nothing else.
        tests: What judges it.
        limits: What it may use.

    Raises:
        ConfigError: The machine cannot isolate it, and must.
    """
    limits = limits or Limits()
    ours, theirs = socket.socketpair()
    task: dict[str, Any] = {
        "cpu_seconds": max(1, round(limits.seconds + 0.5)),
        "memory_bytes": limits.memory_bytes,
        "must_isolate": limits.must_isolate,
    }
    of_judge = {**task, "channel": ours.fileno(), "tests": tests.code, "names": tests.names, "prelude": tests.prelude}
    of_program = {**task, "channel": theirs.fileno(), "program": program}
    with tempfile.TemporaryDirectory(prefix="confined.") as name, tempfile.TemporaryFile() as said, ours, theirs:
        with (
            _started("program", of_program, theirs, name, said) as running,
            _started("judge", of_judge, ours, name, subprocess.PIPE) as judging,
        ):
            ours.close()
            theirs.close()
            assert judging.stdout is not None
            lines, in_time = _lines_within(judging.stdout, limits.seconds)
        said.seek(0)
        for line in (said.read(_MAX_VERDICT_BYTES), *lines[:1]):
            _check(_read_isolation(line), limits)
    if not in_time:
        return Verdict(False, "timed out")
    if len(lines) < 2:
        return Verdict(False, f"failed: the tests ended without a verdict ({_ending(judging.returncode)})")
    verdict = json.loads(lines[1])
    result = str(verdict["result"])
    if "ChannelClosed" in result and running.returncode not in (0, -9):
        result = f"{result} ({_ending(running.returncode)})"
    return Verdict(verdict["passed"] is True, result)


@cache
def isolation_here() -> Isolation:
    """Return what this machine can keep a program from, as tried by a process that then ends."""
    with tempfile.TemporaryDirectory(prefix="confined.") as name:
        task = {"cpu_seconds": 5, "memory_bytes": 2**30, "must_isolate": False}
        process = subprocess.run(
            _command("inside", "begin(json.load(sys.stdin))"), input=json.dumps(task).encode(), capture_output=True,
            cwd=name, env={}, timeout=60, check=False,
        )  # fmt: skip
    return _read_isolation(process.stdout.partition(b"\n")[0])


def check_isolation(limits: Limits) -> None:
    """Refuse to run programs where they could do harm.

    Raises:
        ConfigError: The machine cannot isolate them, and must.
    """
    _check(isolation_here(), limits)


def _check(isolation: Isolation, limits: Limits) -> None:
    if limits.must_isolate and not isolation.is_enough:
        why = "; ".join(f"{name}: {problem}" for name, problem in isolation.problems.items())
        raise ConfigError(
            f"this machine cannot keep programs from network and files ({why})",
            hint="Linux 5.13 or newer on x86_64 or aarch64 can, with seccomp and Landlock",
        )


def _read_isolation(line: bytes) -> Isolation:
    try:
        return Isolation(**json.loads(line.partition(b"\n")[0]))
    except (ValueError, TypeError):
        return Isolation(problems={"start": f"a confined process did not start: {line[:200]!r}"})


def _command(module: str, call: str) -> list[str]:
    """Return the command of an interpreter without site-packages and without the user's environment."""
    root = str(Path(megatron_7b.__file__).parents[1])
    code = (
        f"import json, sys; sys.path.insert(0, {root!r}); from megatron_7b.runtime.confinement.{module} import *; "
        f"sys.path.remove({root!r}); {call}"
    )
    return [sys.executable, "-I", "-S", "-X", "utf8", "-c", code]


@contextlib.contextmanager
def _started(
    module: str, task: dict[str, Any], channel: socket.socket, folder: str, out: IO[bytes] | int
) -> "Iterator[subprocess.Popen[bytes]]":
    """Start one of the two processes, and end it with the block."""
    own = Path(folder) / module
    own.mkdir()
    with tempfile.TemporaryFile() as given:
        given.write(json.dumps(task).encode())
        given.seek(0)
        process = subprocess.Popen(
            _command(module, "main()"), stdin=given, stdout=out, stderr=subprocess.DEVNULL, cwd=own, env={},
            pass_fds=[channel.fileno()], start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _lines_within(stream: IO[bytes], seconds: float) -> tuple[list[bytes], bool]:
    """Return the lines of a judge, and whether it ended in time; the clock starts with the first one."""
    content, deadline = b"", time.monotonic() + _START_SECONDS
    has_begun = False
    while (left := deadline - time.monotonic()) > 0 and len(content) < _MAX_VERDICT_BYTES:
        if not select.select([stream], [], [], left)[0]:
            continue
        part = os.read(stream.fileno(), _MAX_VERDICT_BYTES)
        if not part:
            return content.splitlines(), True
        content += part
        if not has_begun and b"\n" in content:
            has_begun, deadline = True, time.monotonic() + seconds
    return content.splitlines(), False


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
