"""Requests to stop, in real processes that get real signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_7b.runtime.process.signals import (
    EXIT_INTERRUPTED,
    SAME_KEY_PRESS_SECONDS,
    STOP_SIGNALS,
    StopReason,
    StopRequest,
    heeded_signals,
)

# Says `ready`, then works until it is asked to stop; `stuck` waits in native code, where no Python handler runs.
PROGRAM = """
import ctypes, sys, time
from megatron_7b.runtime.process.signals import StopReason, StopRequest
request = StopRequest()
with request.listening():
    print("ready", flush=True)
    if sys.argv[1] == "stuck":
        mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
        libc.pthread_mutex_lock(mutex)
        libc.pthread_mutex_lock(mutex)  # held by itself: for ever
    while request.reason is StopReason.NONE:
        time.sleep(0.01)
    print(request.reason.name, flush=True)
    if sys.argv[1] == "saving":
        time.sleep(30)
"""


def start(mode: str, program: str = PROGRAM) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", program, mode], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", sorted(STOP_SIGNALS))
def test_a_signal_is_taken_note_of_and_ends_nothing(number: signal.Signals) -> None:
    process = start("working")
    process.send_signal(number)
    output, _ = process.communicate(timeout=20)
    assert (output, process.returncode) == (f"{number.name}\n", 0)


def test_the_signals_of_schedulers_terminals_and_people_are_listened_to() -> None:
    names = {"SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGHUP", "SIGINT"}
    assert {number.name for number in STOP_SIGNALS} == names
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        assert {number.name for number in heeded_signals()} == names - {"SIGHUP"}
        with StopRequest().listening():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)


# Building a run: leaves with 75 at a signal, even while it waits in native code; its steps then wait for their end.
BUILDING = """
import ctypes, os, sys, time
from megatron_7b.runtime.process.signals import StopReason, StopRequest, ignore_late_requests
def leave(reason):
    print(f"left for {reason.name}", flush=True)
    os._exit(75)
request = StopRequest(leave=leave)
with request.listening():
    if sys.argv[1] != "building":
        request.begin_steps()
    print("ready", flush=True)
    if sys.argv[1] == "building":
        mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
        libc.pthread_mutex_lock(mutex)
        libc.pthread_mutex_lock(mutex)
    while request.reason is StopReason.NONE:
        time.sleep(0.01)
    print(f"saving for {request.reason.name}", flush=True)
ignore_late_requests()
if sys.argv[1] == "leaving":
    sys.stdin.readline()
sys.exit(75)
"""


@pytest.mark.parametrize("number", sorted(STOP_SIGNALS))
def test_before_the_first_step_a_signal_is_acted_on_at_once(number: signal.Signals) -> None:
    process = start("building", BUILDING)
    process.send_signal(number)
    output, _ = process.communicate(timeout=20)
    assert (output, process.returncode) == (f"left for {number.name}\n", 75)


def test_from_the_first_step_on_a_signal_waits_for_its_end() -> None:
    process = start("training", BUILDING)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=20)
    assert (output, process.returncode) == ("saving for SIGTERM\n", 75)


def test_a_request_that_is_repeated_while_the_run_leaves_changes_nothing() -> None:
    """Slurm's script repeats its signal, torchrun sends SIGTERM to the ranks that are left."""
    process = start("leaving", BUILDING)
    process.send_signal(signal.SIGUSR1)
    assert process.stdout is not None
    assert process.stdout.readline() == "saving for SIGUSR1\n"
    wait_until_ignored(process.pid, signal.SIGTERM)
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP):
        process.send_signal(number)
    process.communicate("\n", timeout=20)
    assert process.returncode == 75


def wait_until_ignored(pid: int, number: signal.Signals) -> None:
    """Wait for a process to ignore a signal, as the kernel sees it."""
    deadline = time.monotonic() + 20
    while True:
        (mask,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigIgn")]
        if int(mask.split()[1], 16) & 1 << (number - 1):
            return
        assert time.monotonic() < deadline
        time.sleep(0.01)


# A child that is forked while building and then ended by its parent, as pools of workers do.
FORKING = """
import os, signal, sys, time
from megatron_7b.runtime.process.signals import StopRequest
with StopRequest(leave=lambda reason: os._exit(75)).listening():
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(3))
        print("ready", flush=True)
        time.sleep(60)
    sys.stdin.readline()
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    time.sleep(0.5)
"""


def test_the_signals_of_a_forked_child_are_its_own() -> None:
    process = start("", FORKING)
    process.communicate("\n", timeout=20)
    assert process.returncode == 0


@pytest.mark.parametrize("mode", ["saving", "stuck"])
def test_the_second_interrupt_leaves_at_once(mode: str) -> None:
    process = start(mode)
    process.send_signal(signal.SIGINT)
    time.sleep(SAME_KEY_PRESS_SECONDS + 0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=5)
    assert process.returncode == EXIT_INTERRUPTED


def test_one_key_press_that_arrives_twice_is_one() -> None:
    """A terminal delivers Ctrl-C to the whole process group, and a launcher passes it on."""
    process = start("saving")
    process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1.0)
    process.kill()
    process.communicate()


def test_the_strongest_reason_counts() -> None:
    request = StopRequest(exit_after_seconds=0.0)
    assert request.reason is StopReason.TIME_LIMIT
    with request.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
    assert request.reason is StopReason.SIGTERM


def test_the_time_limit_counts_from_the_beginning() -> None:
    request = StopRequest(exit_after_seconds=0.2)
    assert request.reason is StopReason.NONE
    time.sleep(0.25)
    assert request.reason is StopReason.TIME_LIMIT


def test_former_handlers_and_descriptors_come_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    descriptors = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    for _ in range(3):
        with StopRequest().listening():
            assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before
    assert descriptors == (len(list(Path("/proc/self/fd").iterdir())) if descriptors else 0)
    assert signal.set_wakeup_fd(-1) == -1
