"""Requests to stop: signals and the time limit set a flag that the training loop checks between steps.

Schedulers announce the end with SIGTERM, SIGUSR1, SIGUSR2 or SIGXCPU, a terminal that closes with SIGHUP; people press
Ctrl-C.
None of them may interrupt a step: the handler only records the signal; the loop finishes its step, lets all ranks
agree, saves and exits with `EXIT_SAVED`. Before the first step there is nothing to save: the process leaves at once.
"""

import contextlib
import ctypes
import enum
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

EXIT_FINISHED = 0
"""All steps are done."""
EXIT_SAVED = 75
"""Stopped early with everything saved: start the same command again (EX_TEMPFAIL of sysexits.h)."""
EXIT_INTERRUPTED = 130
"""Ctrl-C pressed twice: left at once, nothing saved (128 + SIGINT, as shells have it)."""

_PR_SET_PDEATHSIG = 1
"""Of Linux's <sys/prctl.h>: the signal that a process gets when the thread that started it ends."""

SAME_KEY_PRESS_SECONDS = 0.5
"""Interrupts closer together count as one: a launcher may pass on what the terminal has already delivered."""

# A forked child inherits the socket by which `_watching` hears of signals; told there, its own would be taken for ours.
os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, however that ends and whatever this process is doing.

    Args:
        parent: Its process id.

    Raises:
        SystemExit: It has ended already.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit("the process that started this one ended before it began")


class StopReason(enum.IntEnum):
    """Why a run should stop, weakest first, so that the maximum over ranks is the agreed reason."""

    NONE = 0
    TIME_LIMIT = 1
    SIGUSR1 = 2
    SIGUSR2 = 3
    SIGXCPU = 4
    SIGHUP = 5
    SIGTERM = 6
    SIGINT = 7


_REASONS = {signal.Signals[reason.name]: reason for reason in StopReason if reason.name.startswith("SIG")}
STOP_SIGNALS = frozenset(_REASONS)
"""The signals that ask for an orderly end."""


def heeded_signals() -> list[signal.Signals]:
    """Return the signals that this process has to listen to: under `nohup` it is to outlive its terminal."""
    ignores_hangup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in _REASONS if not (number == signal.SIGHUP and ignores_hangup)]


def ignore_late_requests() -> None:
    """For a run that is leaving already: further requests must not turn its orderly end into a death by signal.

    A scheduler repeats its request, and torchrun sends SIGTERM to the other ranks as soon as one has left. Ctrl-C still
    ends a process that does not come to its end.
    """
    for number in _REASONS:
        if number != signal.SIGINT:
            signal.signal(number, signal.SIG_IGN)


class StopRequest:
    """The requests to stop that this process has received; the ranks then have to agree."""

    def __init__(
        self, exit_after_seconds: float | None = None, *, leave: Callable[[StopReason], None] | None = None
    ) -> None:
        """Start the time limit.

        Args:
            exit_after_seconds: Seconds from now after which stopping is asked for; None for no limit.
            leave: Called for a signal that comes before `begin_steps`, from another thread, because Python runs no
                handler while the main thread waits in native code; it has to end the process. None only takes note.
        """
        self._deadline = None if exit_after_seconds is None else time.monotonic() + exit_after_seconds
        self._signalled = StopReason.NONE
        self._leave = leave
        self._leaving = threading.Lock()

    @property
    def reason(self) -> StopReason:
        """The strongest reason to stop that this process knows of. Collective: none."""
        if self._signalled is not StopReason.NONE:
            return self._signalled
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return StopReason.TIME_LIMIT
        return StopReason.NONE

    def begin_steps(self) -> None:
        """Let requests wait for the end of a step from now on, as there will be something to save."""
        with self._leaving:
            self._leave = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Install the handlers for the duration of a with block, then restore the previous ones.

        The first SIGINT asks to stop like the other signals; the second exits at once with `EXIT_INTERRUPTED`.

        Must be entered in the main thread.
        """
        former = {number: signal.signal(number, self._record) for number in heeded_signals()}
        try:
            with _watching(self._act_at_once):
                yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _record(self, number: int, _frame: FrameType | None) -> None:
        self._signalled = max(self._signalled, _REASONS[signal.Signals(number)])

    def _act_at_once(self, reason: StopReason) -> None:
        with self._leaving:
            if self._leave is not None:
                self._leave(reason)


@contextlib.contextmanager
def _watching(act: Callable[[StopReason], None]) -> Iterator[None]:
    """Have a thread see signals as they arrive, whatever the main thread is waiting for; end at the second SIGINT.

    The interpreter writes each signal's number into a socket as it arrives, outside any Python code.

    Args:
        act: Called in that thread.
    """
    receiving, sending = socket.socketpair()
    sending.setblocking(False)
    former_descriptor = signal.set_wakeup_fd(sending.fileno(), warn_on_full_buffer=False)

    def watch() -> None:
        first_interrupt = None
        while numbers := receiving.recv(64):
            if signal.SIGINT in numbers:
                now = time.monotonic()
                first_interrupt = first_interrupt or now
                if now - first_interrupt > SAME_KEY_PRESS_SECONDS:
                    os._exit(EXIT_INTERRUPTED)
            reasons = [reason for number, reason in _REASONS.items() if number in numbers]
            if reasons:
                act(max(reasons))

    watcher = threading.Thread(target=watch, name="signal-watcher", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(former_descriptor)
        sending.close()
        watcher.join()
        receiving.close()
