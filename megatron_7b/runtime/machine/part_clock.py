"""A clock of the parts of a step: at every moment the time counts for exactly one of them.

It is what megatron-core calls `timers`: its schedules, its gradient reductions and its optimizers start and stop a
timer by name, and `_PARTS` says which part that is. On a CPU each change of part reads the time. On a GPU it records an
event in the stream, and nothing waits for it: the events are read when they have happened. So a part's time is what the
device spends in it, waiting included; what overlaps with it costs nothing.
"""

import contextlib
import functools
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from megatron_7b.runtime.machine.device import DeviceType

OTHER = "other"
STEP_RANGE = "step"
"""The name of whole steps in a trace."""
STEP_PARTS = ("data", "teacher", "forward", "backward", "communication", "optimizer", OTHER)
"""What a step consists of, in this order; `other` is all that no part claims."""
HOOKS = "hooks"
"""Of whoever has started the run."""
BETWEEN_STEPS = ("validating", "evaluating", "saving", HOOKS)

_PARTS = {"forward-compute": "forward", "backward-compute": "backward"}
"""Parts by megatron-core's names; those of sending, receiving and reducing are communication."""
_COMMUNICATING = ("-send", "-recv", "-sync", "-all-reduce", "-all-gather")


@functools.cache
def part_of(timer: str) -> str | None:
    """Return the part that one of megatron-core's timers is of; None: it says nothing that others do not."""
    if timer in _PARTS:
        return _PARTS[timer]
    return "communication" if any(word in f"-{timer}" for word in _COMMUNICATING) else None


class PartClock:
    """The time of each part since it was last asked for.

    Parts are nested: while an inner one runs, the outer one does not. Outside of `step` and `between_steps` nothing is
    counted.

    Args:
        device_type: What computes.

    Attributes:
        writes_ranges: Whether steps and parts are named in the profile that is being recorded.
    """

    def __init__(self, device_type: DeviceType) -> None:
        self._marks: _Marks = _EventMarks() if device_type == "cuda" else _HostMarks()
        self._running: list[str] = []
        self._ranges: list[torch.profiler.record_function] = []
        self.writes_ranges = False
        self._num_steps = 0

    def __call__(self, name: str, log_level: int | None = None) -> "_Timer":  # noqa: ARG002 - megatron-core's name
        """Return the timer that megatron-core calls so. A teacher's schedule runs forward for the teacher."""
        part = part_of(name)
        return _Timer(self, "teacher" if part == "forward" and "teacher" in self._running else part)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Count the time of a with block: for `other`, and for the parts within it."""
        with self._outermost(OTHER):
            yield
        self._num_steps += 1

    def between_steps(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Count the time of a with block for one of `BETWEEN_STEPS`, whatever is in it."""
        return self._outermost(name)

    @contextlib.contextmanager
    def _outermost(self, name: str) -> Iterator[None]:
        self._marks.add_up()
        self.begin(name)
        try:
            yield
        finally:
            while self._running:  # more than one if the block failed
                self.end()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time of a with block for a part of the step, except for the parts within it."""
        timer = _Timer(self, name)
        timer.start()
        try:
            yield
        finally:
            timer.stop()

    def begin(self, name: str) -> None:
        """Let the time count for a part until its end, or until an inner part begins."""
        self._marks.mark(self._running[-1] if self._running else None)
        self._running.append(name)
        if self.writes_ranges:
            self._ranges.append(torch.profiler.record_function(STEP_RANGE if name == OTHER else name))
            self._ranges[-1].__enter__()  # type: ignore[no-untyped-call]

    def end(self) -> None:
        """Let the time count for the outer part again."""
        self._marks.mark(self._running.pop())
        if self._ranges:
            self._ranges.pop().__exit__(None, None, None)

    @property
    def is_in_step(self) -> bool:
        """Whether parts are counted."""
        return bool(self._running) and self._running[0] == OTHER

    def take(self) -> tuple[int, dict[str, float]]:
        """Return how many steps there were since the last call, and the seconds of each part; on a GPU, wait for them.

        Collective: none.
        """
        self._marks.wait()
        self._marks.add_up()
        num_steps, self._num_steps = self._num_steps, 0
        seconds = dict(self._marks.seconds)
        self._marks.seconds.clear()
        return num_steps, seconds


class _Timer:
    """What megatron-core starts and stops."""

    def __init__(self, clock: PartClock, part: str | None) -> None:
        self._clock, self._part = clock, part

    def start(self, barrier: bool = False) -> None:  # noqa: ARG002 - a barrier would change what is measured
        """Let the time count for the part."""
        if self._part is not None and self._clock.is_in_step:
            self._clock.begin(self._part)

    def stop(self, barrier: bool = False) -> None:  # noqa: ARG002
        """Let the time count for what was interrupted."""
        if self._part is not None and self._clock.is_in_step:
            self._clock.end()


class _Marks(Protocol):
    """Moments, and the time between them.

    Attributes:
        seconds: Added up so far, by part.
    """

    seconds: dict[str, float]

    def mark(self, ended: str | None) -> None:
        """Take note of now; `ended` is what the time since the last mark was for."""

    def add_up(self) -> None:
        """Add what is known by now to `seconds`."""

    def wait(self) -> None:
        """Wait until everything is known."""


class _HostMarks:
    """The processor's clock."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._last = 0.0

    def mark(self, ended: str | None) -> None:
        now = time.perf_counter()
        if ended is not None:
            self.seconds[ended] += now - self._last
        self._last = now

    def add_up(self) -> None:
        pass

    def wait(self) -> None:
        pass


class _EventMarks:
    """Events of a CUDA stream; they are used again, so that a step creates none."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._pending: list[tuple[Any, str | None]] = []
        self._free: list[Any] = []

    def mark(self, ended: str | None) -> None:
        if torch.cuda.is_current_stream_capturing():  # a graph would record it once and for all
            return
        event: Any = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._pending.append((event, ended))

    def add_up(self) -> None:
        """Read all events that have happened but the newest, from which the next part is measured."""
        done = 0
        for (event, _), (following, ended) in zip(self._pending, self._pending[1:], strict=False):
            if not (event.query() and following.query()):  # both: they may be of two streams
                break
            if ended is not None:
                self.seconds[ended] += event.elapsed_time(following) / 1e3
            self._free.append(event)
            done += 1
        del self._pending[:done]

    def wait(self) -> None:
        if self._pending:
            self._pending[-1][0].synchronize()
