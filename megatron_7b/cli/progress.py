"""Progress of what reads files: a live bar on a terminal, plain lines in a log. All of it on stderr."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from megatron_7b.runtime.process.signals import EXIT_INTERRUPTED

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_SHORT_LINES = 5.0


class Progress(Protocol):
    """Either kind."""

    def update(self, bytes_read: int, documents: int, tokens: int) -> None:
        """Totals so far."""

    def warn(self, message: str) -> None:
        """Show a message without disturbing the bar."""


class PlainProgress:
    """A line every few seconds, or after a number of documents."""

    def __init__(self, total_bytes: int, interval_documents: int | None) -> None:
        self._total = max(1, total_bytes)
        self._interval = interval_documents
        self._start = self._last_time = time.perf_counter()
        self._last_documents = 0

    def update(self, bytes_read: int, documents: int, tokens: int) -> None:
        """Print a line if one is due."""
        now = time.perf_counter()
        if self._interval is None:
            due = now - self._last_time >= _SECONDS_BETWEEN_LINES
        else:
            due = documents - self._last_documents >= self._interval
        if not due:
            return
        self._last_time, self._last_documents = now, documents
        seconds = max(1e-9, now - self._start)
        left = (self._total - bytes_read) * seconds / max(1, bytes_read)
        print(
            f"{bytes_read / self._total:6.1%}  {bytes_read / 1e6 / seconds:,.1f} MB/s  {documents:,} documents  "
            f"{tokens:,} tokens  {_format_seconds(left)} left",
            file=sys.stderr,
            flush=True,
        )

    def warn(self, message: str) -> None:
        """Print the message."""
        print(message, file=sys.stderr, flush=True)


class LiveProgress:
    """A bar with MB/s, documents and the time left."""

    def __init__(self, bar: Any, task: Any) -> None:
        self._bar, self._task = bar, task
        self._start = time.perf_counter()

    def update(self, bytes_read: int, documents: int, tokens: int) -> None:
        """Move the bar."""
        rate = bytes_read / 1e6 / max(1e-9, time.perf_counter() - self._start)
        text = f"{rate:,.1f} MB/s  {documents:,} documents  {tokens / 1e6:,.1f} M tokens"
        self._bar.update(self._task, completed=bytes_read, figures=text)

    def warn(self, message: str) -> None:
        """Print the message above the bar."""
        self._bar.console.print(message, markup=False, highlight=False)


class LineProgress:
    """A line on stderr every few seconds: how much is done, and how long the rest will take.

    Args:
        unit: What is counted, in the plural.
        begin: How many were done before.
    """

    def __init__(self, unit: str, *, begin: int = 0) -> None:
        self._unit, self._begin = unit, begin
        self._start = self._last = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return max(1e-9, time.perf_counter() - self._start)

    def update(self, done: int, total: int | None, *figures: str) -> None:
        """Print a line if one is due; the last one is left out, as the result follows.

        Args:
            done: How many are done, those before included.
            total: How many there are; None: nobody knows.
            figures: What else the line says.
        """
        now = time.perf_counter()
        if now - self._last < _SECONDS_BETWEEN_SHORT_LINES or done == total or done <= self._begin:
            return
        self._last = now
        speed = (done - self._begin) / self.seconds
        words = [f"{done:,}{'' if total is None else f' of {total:,}'} {self._unit}", *figures]
        words.append(
            f"{speed:,.1f} {self._unit}/s" if total is None else f"{_format_seconds((total - done) / speed)} left"
        )
        print("  ".join(words), file=sys.stderr, flush=True)


@contextmanager
def open_progress(total_bytes: int, interval_documents: int | None = None) -> Iterator[Progress]:
    """Show a live bar if stderr is a terminal, else plain lines."""
    with _open_bar("TaskProgressColumn", "figures", "TimeRemainingColumn") as bar:
        if bar is None:
            yield PlainProgress(total_bytes, interval_documents)
        else:
            yield LiveProgress(bar, bar.add_task("", total=total_bytes, figures=""))


@contextmanager
def open_byte_progress(total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar with MB/s on a terminal, else nothing; what it yields may be called on any thread."""
    with _open_bar("DownloadColumn", "TransferSpeedColumn", "TimeRemainingColumn") as bar:
        if bar is None:
            yield lambda _: None
        else:
            task = bar.add_task("", total=total)
            yield lambda num_bytes: bar.advance(task, num_bytes)


@contextmanager
def open_phases() -> Iterator["PhasesProgress"]:
    """Show a bar per phase on a terminal, else a line per phase."""
    with _open_bar("DownloadColumn", "TimeRemainingColumn", begin="phase") as bar:
        yield PhasesProgress(bar)


class PhasesProgress:
    """Progress of a run in phases, each over all of its input."""

    def __init__(self, bar: Any) -> None:
        """Begin without a phase; `bar` is None without a terminal."""
        self._bar = bar
        self._task: Any = None

    def begin(self, phase: str, total: int) -> None:
        """Begin a phase of this many bytes."""
        if self._bar is None:
            print(f"{phase}: {total / 1e6:,.1f} MB of input", file=sys.stderr)
        else:
            self._task = self._bar.add_task("", total=total, phase=phase)

    def advance(self, size: int) -> None:
        """Move the bar; without one, the next phase says that this one is done."""
        if self._bar is not None:
            self._bar.advance(self._task, size)

    def warn(self, message: str) -> None:
        """Print the message, above the bar if there is one."""
        if self._bar is None:
            print(f"warning: {message}", file=sys.stderr)
        else:
            self._bar.console.print(f"warning: {message}", markup=False)


@contextmanager
def _open_bar(*columns: str, begin: str | None = None) -> Iterator[Any]:
    """Yield rich's bar on stderr, or None without a terminal.

    Args:
        columns: Names of rich's columns, or of fields of the task that are shown as they are.
        begin: A field that is shown before the bar.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich import progress
    from rich.console import Console

    def column(name: str) -> Any:
        return getattr(progress, name)() if hasattr(progress, name) else progress.TextColumn(f"{{task.fields[{name}]}}")

    first = [] if begin is None else [column(begin)]
    with progress.Progress(*first, progress.BarColumn(), *map(column, columns), console=Console(stderr=True)) as bar:
        yield bar


@contextmanager
def continued_by_the_same_command() -> Iterator[None]:
    """Say so when somebody interrupts a with block.

    Raises:
        SystemExit: With the code of an interruption.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted; the same command continues from here", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None


def _format_seconds(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
