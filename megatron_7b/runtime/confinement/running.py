"""The outside: starts a program and its judge, waits as long as they may take, and says how it went."""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import megatron_7b
from megatron_7b.errors import ConfigError
from megatron_7b.runtime.confinement.inside import LIBRARY_PATH, Isolation

_MAX_LINE_BYTES = 64 * 1024
_START_SECONDS = 60.0
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
    task = {
        **_task(max(1, round(limits.seconds + 0.5)), limits.memory_bytes),
        "must_isolate": limits.must_isolate,
    }
    of_judge = {**task, "channel": ours.fileno(), "tests": tests.code, "names": tests.names, "prelude": tests.prelude}
    of_program = {**task, "channel": theirs.fileno(), "program": program}
    # Without isolation a program may leave behind what cannot be removed.
    with (
        tempfile.TemporaryDirectory(prefix="confined.", ignore_cleanup_errors=True) as name,
        ours,
        theirs,
        _started("program", of_program, theirs, name) as running,
        _started("judge", of_judge, ours, name) as judging,
    ):
        ours.close()
        theirs.close()
        # The first line of each is written before it has read anything of a program.
        for process in (running, judging):
            _check(_read_isolation(_next_line(process, _START_SECONDS) or b""), limits)
        line = _next_line(judging, limits.seconds)
    if line is None:
        return Verdict(False, "timed out")
    if not line:
        return Verdict(False, f"failed: the tests ended without a verdict ({_ending(judging.returncode)})")
    verdict = json.loads(line)
    result = str(verdict["result"])
    if "ChannelClosed" in result and running.returncode not in (0, -9):
        result = f"{result} ({_ending(running.returncode)})"
    return Verdict(verdict["passed"] is True, result)


@cache
def isolation_here() -> Isolation:
    """Return what this machine can keep a program from, as tried by a process that then ends."""
    with tempfile.TemporaryDirectory(prefix="confined.") as name:
        task = {**_task(5, 2**30), "must_isolate": False}
        process = subprocess.run(
            _command("inside", "begin(json.load(sys.stdin))"), input=json.dumps(task).encode(), capture_output=True,
            cwd=name, env=_environment(), timeout=60, check=False,
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


def _task(cpu_seconds: int, memory_bytes: int) -> dict[str, Any]:
    return {"cpu_seconds": cpu_seconds, "memory_bytes": memory_bytes, "parent": os.getpid()}


def _environment() -> dict[str, str]:
    return {LIBRARY_PATH: os.environ[LIBRARY_PATH]} if LIBRARY_PATH in os.environ else {}


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
    module: str, task: dict[str, Any], channel: socket.socket, folder: str
) -> "Iterator[subprocess.Popen[bytes]]":
    """Start one of the two processes; end it, and all of its group, with the block."""
    own = Path(folder) / module
    own.mkdir()
    with tempfile.TemporaryFile() as given:
        given.write(json.dumps(task).encode())
        given.seek(0)
        process = subprocess.Popen(
            _command(module, "main()"), stdin=given, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=own,
            env=_environment(), pass_fds=[channel.fileno()], start_new_session=True, bufsize=0,
        )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS has the latter for ended ones
            os.killpg(process.pid, signal.SIGKILL)  # it is the first of its group, and nobody has waited for it
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _next_line(process: "subprocess.Popen[bytes]", seconds: float) -> bytes | None:
    """Return the next line of a process; empty if it has ended without one, None if it takes longer."""
    assert process.stdout is not None
    line, deadline = b"", time.monotonic() + seconds
    while not line.endswith(b"\n") and len(line) < _MAX_LINE_BYTES:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
            return None
        # One byte at a time: what comes after the line is the next one's.
        part = os.read(process.stdout.fileno(), 1)
        if not part:
            return b""
        line += part
    return line


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
