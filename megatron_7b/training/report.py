"""Where metrics go: metrics.jsonl, TensorBoard, Weights & Biases, and the screen.

Only the main rank reports. A sink costs microseconds per step: files are appended to without waiting for the disk, and
TensorBoard and Weights & Biases write in threads of their own.
"""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import override

from rich.progress import BarColumn, Progress, TextColumn

from megatron_7b.config.schema import RunConfig
from megatron_7b.runtime.process.logs import console
from megatron_7b.training.metrics import (
    Metrics,
    StepMetrics,
    TaskMetrics,
    ValidationMetrics,
    format_count,
    to_json,
)
from megatron_7b.training.run_folder import RunFolder
from megatron_7b.training.services import InBackground, open_services
from megatron_7b.training.sink import Sink

logger = logging.getLogger(__name__)


SECONDS_BETWEEN_LINES = 60.0
"""A log in which nothing appears for longer looks like a run that hangs."""


WIDE_COLUMNS = 140
"""Width of a terminal on which a line has room for all figures of a step; a narrower one shows the most important."""
_FURTHER_MEANS_SHOWN = 2
"""How many of the means that an objective reports beside its loss a line of a step has room for."""


class MetricsFile(Sink):
    """metrics.jsonl: one line per step and per validation, handed to the operating system at once."""

    def __init__(self, folder: RunFolder) -> None:
        self._file = folder.metrics.open("a", encoding="utf-8")

    @override
    def write_step(self, metrics: StepMetrics) -> None:
        self._append(metrics)

    @override
    def write_validation(self, metrics: ValidationMetrics) -> None:
        self._append(metrics)

    @override
    def write_tasks(self, metrics: TaskMetrics) -> None:
        self._append(metrics)

    @override
    def close(self) -> None:
        """Close the file once everything is on the disk."""
        with self._named_in_errors(), self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    def _append(self, metrics: Metrics) -> None:
        # Flushed line by line, so that the lines survive a killed process.
        with self._named_in_errors():
            self._file.write(to_json(metrics) + "\n")
            self._file.flush()

    @contextmanager
    def _named_in_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # of a full disk, which names no file
            raise OSError(error.errno, error.strerror, self._file.name) from error


class ProgressLine(Sink):
    """A bar with the newest figures at the bottom of a terminal; log messages go above it."""

    def __init__(self, *, resumed_step: int, train_steps: int) -> None:
        self._pace = Pace(resumed_step, train_steps)
        self._train_steps = train_steps
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
            console=console,
            refresh_per_second=4,
        )
        self._task = self._progress.add_task(
            f"step {resumed_step}/{train_steps}", total=train_steps, completed=resumed_step, figures=""
        )
        self._progress.start()

    @override
    def write_step(self, metrics: StepMetrics) -> None:
        speed = f"{format_count(metrics.tokens_per_second)} tok/s"
        figures = _figures(metrics) if console.width >= WIDE_COLUMNS else f"loss {metrics.loss:.4f} · {speed}"
        self._progress.update(
            self._task,
            completed=metrics.step,
            description=f"step {metrics.step}/{self._train_steps}",
            figures=f"{figures} · ETA {self._pace.remaining(metrics.step)}",
        )

    @override
    def close(self) -> None:
        self._progress.stop()


class LogLines(Sink):
    """A plain line of the log every few steps; beside a progress bar only the log file gets it.

    The first and the last step of a start have one whatever the interval, and slow steps one a minute.
    """

    def __init__(self, *, resumed_step: int, train_steps: int, log_interval_steps: int) -> None:
        self._pace = Pace(resumed_step, train_steps)
        self._level = logging.DEBUG if console.is_terminal else logging.INFO
        self._milestones = (resumed_step + 1, train_steps)
        self._train_steps = train_steps
        self._interval = log_interval_steps
        self._last_time = time.monotonic()

    @override
    def write_step(self, metrics: StepMetrics) -> None:
        remaining, now = self._pace.remaining(metrics.step), time.monotonic()
        is_due = metrics.step % self._interval == 0 or metrics.step in self._milestones or metrics.timing is not None
        if is_due or now - self._last_time >= SECONDS_BETWEEN_LINES:
            self._last_time = now
            figures = _figures(metrics, with_parts=True)
            line = f"step {metrics.step}/{self._train_steps} · {figures} · ETA {remaining}"
            if metrics.timing is not None and metrics.timing.straggler is not None:
                line += f" · {metrics.timing.straggler}"
            logger.log(self._level, "%s", line)
        if metrics.memory is not None and metrics.memory.predicted:
            logger.log(self._level, "memory of the fullest rank: %s", metrics.memory)

    @override
    def write_validation(self, metrics: ValidationMetrics) -> None:
        logger.info("%s", _validation_line(metrics))

    @override
    def write_tasks(self, metrics: TaskMetrics) -> None:
        logger.info("%s", _tasks_line(metrics))


class Pace:
    """Estimates the remaining time from the pace so far, validation and saving included."""

    def __init__(self, resumed_step: int, train_steps: int) -> None:
        self._train_steps = train_steps
        self._first_step = resumed_step + 1
        self._first_done = 0.0

    def remaining(self, step: int) -> str:
        """Return the time left after a step as h:mm:ss; the first step, which warms up, does not count."""
        now = time.monotonic()
        if step <= self._first_step:
            self._first_done = now
            return "-:--:--"
        seconds = round((now - self._first_done) / (step - self._first_step) * (self._train_steps - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def _figures(metrics: StepMetrics, *, with_parts: bool = False) -> str:
    seconds = f"{metrics.step_seconds:.3g} s"
    if with_parts and metrics.timing is not None:
        seconds += f" ({metrics.timing.shares})"
    figures = [
        f"loss {metrics.loss:.4f}",
        f"lr {metrics.learning_rate:.2e}",
        f"grad {metrics.grad_norm:.2f}",
        seconds,
        f"{format_count(metrics.tokens_per_second)} tok/s",
        _speed(metrics.tflops_per_device),
        _memory(metrics),
    ]
    figures[1:1] = _further_means(metrics)[:_FURTHER_MEANS_SHOWN]
    if metrics.mfu is not None:
        figures.insert(-1, f"MFU {metrics.mfu:.1%}")
    return " · ".join(figures)


def _memory(metrics: StepMetrics) -> str:
    own = f"{metrics.memory_bytes / 1e9:.2f} GB"
    return own if metrics.device_memory_bytes is None else f"{own}, device {metrics.device_memory_bytes / 1e9:.2f} GB"


def _speed(tflops: float) -> str:
    return f"{tflops:.3g} TFLOP/s" if tflops >= 1 else f"{tflops * 1e3:.3g} GFLOP/s"


def _validation_line(metrics: ValidationMetrics) -> str:
    figures = [
        f"validation at step {metrics.step}: loss {metrics.validation_loss:.4f}",
        f"perplexity {metrics.validation_perplexity:.2f}",
        *_further_means(metrics),
        f"{format_count(metrics.validation_tokens)} tokens in {metrics.validation_seconds:.1f} s",
    ]
    return " · ".join(figures)


def _tasks_line(metrics: TaskMetrics) -> str:
    found = metrics.extra
    figures = [
        f"{name.removeprefix('eval/')} {value:.4f}"
        + (f" ± {error:.4f}" if (error := found.get(f"{name}_stderr")) else "")
        for name, value in found.items()
        if not name.endswith("_stderr")
    ]
    return " · ".join(
        [f"tasks at step {metrics.step}: {figures[0]}", *figures[1:], f"{metrics.evaluation_seconds:.1f} s"]
    )


def _further_means(metrics: StepMetrics | ValidationMetrics) -> list[str]:
    return [f"{name} {value:.4g}" for name, value in metrics.extra.items()]


@contextmanager
def open_sinks(folder: RunFolder, config: RunConfig, *, resumed_step: int) -> Iterator[list[Sink]]:
    """Open all sinks that the configuration asks for, for the duration of a with block; the main rank does so.

    Args:
        folder: The run folder, opened, its metrics.jsonl cut to the resumed step.
        config: Effective configuration.
        resumed_step: Steps done by earlier starts.
    """
    telemetry, train_steps = config.telemetry, config.training.train_steps
    sinks: list[Sink] = [MetricsFile(folder)]
    try:
        sinks += [InBackground(service) for service in open_services(folder, config, resumed_step)]
        if console.is_terminal:
            sinks.append(ProgressLine(resumed_step=resumed_step, train_steps=train_steps))
        sinks.append(
            LogLines(
                resumed_step=resumed_step, train_steps=train_steps, log_interval_steps=telemetry.log_interval_steps
            )
        )
        yield sinks
    finally:
        for sink in reversed(sinks):
            try:
                sink.close()
            except OSError as error:  # must not hide why the run ends, nor make one that has been saved look failed
                logger.warning("%s did not end well: %s", type(sink).__name__, error)
