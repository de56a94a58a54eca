"""A hook from outside the package: ends the run once the loss has been low enough, and keeps a record of its life."""

from pathlib import Path
from typing import override

from megatron_7b.training.hooks import Hook
from megatron_7b.training.metrics import StepMetrics, ValidationMetrics
from megatron_7b.training.run import Run


class EarlyStop(Hook):
    def __init__(self, loss: float, record: Path) -> None:
        self._loss, self._record = loss, record

    @override
    def on_start(self, run: Run) -> None:
        self._note(run, f"start {run.step}")

    @override
    def after_step(self, run: Run, metrics: StepMetrics) -> None:
        if metrics.loss < self._loss:
            run.finish_early(f"the loss is below {self._loss:g}")

    @override
    def after_validation(self, run: Run, metrics: ValidationMetrics) -> None:
        self._note(run, f"validated {metrics.step}")

    @override
    def on_end(self, run: Run) -> None:
        self._note(run, f"end {run.step} {run.failure}")

    def _note(self, run: Run, words: str) -> None:
        if run.ranks.is_main:
            with self._record.open("a") as file:
                file.write(words + "\n")
