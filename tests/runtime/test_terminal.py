"""Output that nobody can take any more: real pipes, terminals and full devices."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.assets import REPOSITORY

# Logs a line before and after standard error goes away, as a run does at each step.
PROGRAM = """
import logging, sys
from megatron_7b.runtime.process.logs import configure_logging, console
from megatron_7b.runtime.process.terminal import finish_output, say
configure_logging()
logger = logging.getLogger("megatron_7b.x")
logger.info("first")
sys.stdin.readline()
for _ in range(3):
    logger.info("into nowhere")
    console.print("into nowhere")
    if len(sys.argv) > 2:  # as libraries do, which know nothing of it
        print("into nowhere", file=sys.stderr)
say("error: into nowhere")
finish_output()
open(sys.argv[1], "w").close()
sys.exit(9)
"""

BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
BUFFERED["PYTHONPATH"] = str(REPOSITORY)


def start(tmp_path: Path, stderr: int, *options: str, **environment: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "end"), *options],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=stderr,
        env=BUFFERED | environment,
    )  # fmt: skip


def finish(process: "subprocess.Popen[bytes]", tmp_path: Path) -> None:
    assert process.stdin is not None
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.wait(timeout=60) == 9
    assert (tmp_path / "end").exists()


@pytest.mark.parametrize("as_terminal", [{}, {"FORCE_COLOR": "1"}])
def test_a_reader_that_leaves_ends_nothing(tmp_path: Path, as_terminal: dict[str, str]) -> None:
    reading, writing = os.pipe()
    process = start(tmp_path, writing, "print", **as_terminal)
    os.close(writing)
    assert b"first" in os.read(reading, 1000)
    os.close(reading)
    finish(process, tmp_path)


def test_a_terminal_that_closes_ends_nothing(tmp_path: Path) -> None:
    terminal, end = pty.openpty()
    process = start(tmp_path, end, "print", TERM="xterm")
    os.close(end)
    assert b"first" in os.read(terminal, 1000)
    os.close(terminal)
    finish(process, tmp_path)


def test_a_log_on_a_full_disk_ends_nothing(tmp_path: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        finish(start(tmp_path, full.fileno()), tmp_path)


@pytest.mark.parametrize("output", ["/dev/full", "a pipe that nobody reads"])
def test_results_that_nobody_takes_do_not_change_the_exit_code(output: str) -> None:
    """What is still buffered when a command fails would make 120 of its exit code."""
    program = (
        "from megatron_7b.runtime.process import terminal; print(1); terminal.finish_output(); raise SystemExit(2)"
    )
    if output == "/dev/full":
        writing = os.open(output, os.O_WRONLY)
    else:
        reading, writing = os.pipe()
        os.close(reading)
    process = subprocess.run([sys.executable, "-c", program], stdout=writing, env=BUFFERED, timeout=60)
    os.close(writing)
    assert process.returncode == 2


def test_without_standard_error_nothing_is_said(tmp_path: Path) -> None:
    process = subprocess.run(
        ["bash", "-c", 'exec "$0" "$@" 2>&-', sys.executable, "-c", PROGRAM, str(tmp_path / "end")],
        input=b"\n", capture_output=True, env=BUFFERED, timeout=60,
    )  # fmt: skip
    assert process.returncode == 9
    assert (tmp_path / "end").exists()
