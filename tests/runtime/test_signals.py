"""Requests to stop, in real processes that get real signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_7b.runtime.signals import EXIT_INTERRUPTED, SAME_KEY_PRESS_SECONDS, StopReason, StopRequest

# Says `ready`, then works until it is asked to stop; `stuck` waits in native code, where no Python handler runs.
PROGRAM = """
import ctypes, sys, time
from megatron_7b.runtime.signals import StopReason, StopRequest
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


def start(mode: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, mode], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_is_taken_note_of_and_ends_nothing(name: str) -> None:
    process = start("working")
    process.send_signal(signal.Signals[name])
    output, _ = process.communicate(timeout=20)
    assert (output, process.returncode) == (f"{name}\n", 0)


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
