"""Commands of megatron-7b that die of SIGKILL: at any time, or at a chosen call of the system.

They run in forks of a process that has imported everything, so that the time goes into the command itself.
"""

import itertools
import os
import resource
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from megatron_7b.data.preprocess import pipeline, preprocessing
from tests.support.commands import exit_code_of, redirect
from tests.support.fork_server import fork_server

SMALL_BLOCK = 1 << 13
_CALLS = ((os, "replace"), (os, "unlink"), (os, "fsync"), (os, "ftruncate"), (os, "write"), (Path, "unlink"))
"""What a command does to files from Python, among it every renaming."""


def start(arguments: Sequence[object], log: Path, die_at_call: int | None = None, file_bytes: int | None = None) -> Any:
    """Start `megatron-7b ARGUMENTS` as the leader of a process group of its own.

    Args:
        arguments: Of the command line.
        log: What it prints goes there; with `die_at_call` -1 also, last, how many of `_CALLS` it made.
        die_at_call: Kill it in place of that call, from 0; None lets it live.
        file_bytes: No file may become larger.
    """
    words = [str(one) for one in arguments]
    log.write_text("")
    process = fork_server().Process(target=_run, args=(words, str(log), die_at_call, file_bytes))
    process.start()
    return process


def run(arguments: Sequence[object], log: Path, die_at_call: int | None = None) -> str:
    """Run a command to its end, or to its death; return what it printed."""
    process = start(arguments, log, die_at_call)
    process.join()
    wanted = 0 if die_at_call in (None, -1) else -signal.SIGKILL
    assert process.exitcode == wanted, f"exit code {process.exitcode}\n{log.read_text()}"
    return log.read_text()


def kill(process: Any, seconds: float) -> bool:
    """Kill a command and all its children after so much time; False if it had finished by then."""
    process.join(seconds)
    if process.exitcode is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # so early that it is no leader of its own yet
            process.kill()
        process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return bool(process.exitcode)


def _run(arguments: list[str], log: str, die_at_call: int | None, file_bytes: int | None) -> None:
    os.setsid()
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))
    redirect(log, log)
    pipeline.SECONDS_BETWEEN_CHECKPOINTS = 0.0
    build = preprocessing._Preprocessing._build_job
    preprocessing._Preprocessing._build_job = lambda *given: replace(build(*given), block_bytes=SMALL_BLOCK)
    counter = itertools.count()
    if die_at_call is not None:
        for owner, name in _CALLS:
            mock.patch.object(owner, name, _deadly(getattr(owner, name), counter, die_at_call)).start()
    code = exit_code_of(arguments)
    if die_at_call == -1:
        print(next(counter), flush=True)
    os._exit(code)


def _deadly(function: Any, counter: "itertools.count[int]", die_at_call: int) -> Any:
    def call(*arguments: Any, **keywords: Any) -> Any:
        if next(counter) == die_at_call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **keywords)

    return call
