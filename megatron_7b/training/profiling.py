"""Profiles of a few steps, in RUN/profile: a trace that Perfetto opens, and a table of kernels by part."""

import gzip
import json
import logging
import os
import shutil
from pathlib import Path
from typing import override

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_7b.config.profile_steps import read_profile_steps
from megatron_7b.config.schema import TelemetryConfig
from megatron_7b.files import replace_text, replacing
from megatron_7b.runtime.machine.hardware import device_name
from megatron_7b.training.hooks import Hook
from megatron_7b.training.metrics import StepMetrics
from megatron_7b.training.run import Run
from megatron_7b.training.trace_table import KernelTable, read_trace, tabulate

logger = logging.getLogger(__name__)


class StepProfile:
    """The profile of a range of steps on this rank.

    What is between two of the steps, such as a validation, is in the trace, and not in the table of a CPU. A profile
    that cannot be written does not end the run.

    Args:
        steps: Which steps, counted from 1.
        ranks: On which ranks.
    """

    def __init__(self, steps: range, ranks: tuple[int, ...]) -> None:
        self._steps, self._ranks = steps, ranks
        self._profiler: profile | None = None
        self._first_step = 0

    def begin_if_due(self, run: Run) -> None:
        """Begin before the first of the steps that is still to be done."""
        is_due = self._profiler is None and run.step + 1 in self._steps and not run.is_leaving
        if not is_due or run.ranks.rank not in self._ranks:
            return
        on_gpu = run.learner.on_ranks.device_type == "cuda"
        if on_gpu:
            torch.cuda.synchronize()  # the kernels of the step before are not of this one
        else:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it calls the absence of a GPU an error
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        self._profiler, self._first_step = profile(activities=activities), run.step + 1
        self._profiler.start()
        run.learner.clock.writes_ranges = True

    def end_if_due(self, run: Run) -> None:
        """End after the last of the steps, or the last before the run leaves, and write what was found."""
        if self._profiler is None or not (run.step == self._steps[-1] or run.is_leaving):
            return
        profiler = self._stop(run)
        try:
            self._write(run, profiler)
        except (OSError, RuntimeError, ValueError) as error:
            logger.warning("the profile of steps %d to %d was not written: %s", self._first_step, run.step, error)

    def discard(self, run: Run) -> None:
        """End without a word, if the run has failed in between."""
        if self._profiler is not None:
            self._stop(run)

    def say_if_over(self, run: Run) -> None:
        """Say that there will be no profile, because earlier starts have done all its steps."""
        if run.ranks.is_main and run.step >= self._steps[-1]:
            logger.warning(
                "nothing is profiled: step %d is done, and telemetry.profile_steps ends with step %d",
                run.step, self._steps[-1],
            )  # fmt: skip

    def _stop(self, run: Run) -> profile:
        profiler, self._profiler = self._profiler, None
        assert profiler is not None
        run.learner.clock.writes_ranges = False
        if run.learner.on_ranks.device_type == "cuda":
            torch.cuda.synchronize()
        profiler.stop()
        return profiler

    def _write(self, run: Run, profiler: profile) -> None:
        steps = f"{self._first_step}-{run.step}"
        folder, name = run.folder.profile, f"rank_{run.ranks.rank}_steps_{steps}"
        folder.mkdir(exist_ok=True)
        trace = folder / f"{name}.trace.json.gz"
        table = _write_trace(profiler, trace)
        device = device_name(run.learner.on_ranks.device_type)
        title = f"Rank {run.ranks.rank} of {run.learner.layout} on {device}, steps {steps}"
        replace_text(folder / f"{name}.txt", table.to_text(title))
        about = {"rank": run.ranks.rank, "first_step": self._first_step, "last_step": run.step}
        replace_text(folder / f"{name}.json", json.dumps(about | table.to_dict(), indent=1) + "\n")
        largest = ", ".join(f"{part['part']} {part['share']:.0%}" for part in table.to_dict()["parts"][:4])
        logger.info("profile of steps %s: %s; %s, for ui.perfetto.dev", steps, largest, trace)


def _write_trace(profiler: profile, path: Path) -> KernelTable:
    """Write the trace, compressed, and return its table."""
    plain = path.with_name(f".{path.name}.plain.tmp")
    try:
        profiler.export_chrome_trace(str(plain))
        with replacing(path) as beside, plain.open("rb") as source, gzip.open(beside, "wb", compresslevel=5) as packed:
            shutil.copyfileobj(source, packed)
        return tabulate(read_trace(plain))
    finally:
        plain.unlink(missing_ok=True)


class BeginningProfile(Hook):
    """Begins a profile; called last, so that saving before its first step is not in it.

    It also ends one if another hook has decided that there is no next step, such as early stopping.
    """

    def __init__(self, step_profile: StepProfile) -> None:
        self._profile = step_profile

    @override
    def on_start(self, run: Run) -> None:
        self._profile.say_if_over(run)
        self._profile.begin_if_due(run)

    @override
    def after_step(self, run: Run, metrics: StepMetrics) -> None:
        self._profile.end_if_due(run)
        self._profile.begin_if_due(run)


class EndingProfile(Hook):
    """Ends a profile; called first, so that a validation after its last step is not in it."""

    def __init__(self, step_profile: StepProfile) -> None:
        self._profile = step_profile

    @override
    def after_step(self, run: Run, metrics: StepMetrics) -> None:
        self._profile.end_if_due(run)

    @override
    def on_end(self, run: Run) -> None:
        self._profile.discard(run)


def profiling_hooks(telemetry: TelemetryConfig) -> tuple[list[Hook], list[Hook]]:
    """Return the hooks that are called before all others, and those after; none if nothing is to be profiled."""
    if telemetry.profile_steps is None:
        return [], []
    step_profile = StepProfile(read_profile_steps(telemetry.profile_steps), telemetry.profile_ranks)
    return [EndingProfile(step_profile)], [BeginningProfile(step_profile)]
