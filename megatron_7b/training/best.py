"""The best weights of a run by one of its validation figures, apart from the checkpoints that it continues from."""

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import override

from megatron_7b.checkpoint.publishing import keep_newest
from megatron_7b.checkpoint.save import begin_save
from megatron_7b.errors import ConfigError
from megatron_7b.files import replace_text
from megatron_7b.training.hooks import Hook
from megatron_7b.training.metrics import TaskMetrics, ValidationMetrics, named_values
from megatron_7b.training.run import Run
from megatron_7b.training.run_folder import read_metrics
from megatron_7b.training.run_tasks import OF_TASKS

logger = logging.getLogger(__name__)

_SMALLER_IS_BETTER = ("loss", "perplexity", "error", "kl", "/rejected")
"""Ends of the names of figures of validations."""


@dataclass(frozen=True)
class Best:
    """The best figure so far.

    Attributes:
        metric: Its name in metrics.jsonl.
        value: The figure.
        step: After which step.
    """

    metric: str
    value: float
    step: int


class KeepingBest(Hook):
    """Saves the weights after each validation, or measurement on tasks, that is better than all before it.

    They are `RUN/best`.

    Args:
        metric: Name of a figure, as metrics.jsonl has it. Of losses, errors and the like of validations the smallest is
            the best one, of their other figures the largest; tasks say which way is better.
        patience: End the run after this many in a row without a better one; 0: never.
    """

    def __init__(self, metric: str, patience: int = 0) -> None:
        self._metric, self._patience = metric, patience
        self._best: Best | None = None
        self._num_worse = 0
        self._smaller_is_better = metric.endswith(_SMALLER_IS_BETTER)  # tasks say it themselves

    @override
    def on_start(self, run: Run) -> None:
        """Find out how good the best weights of earlier starts are.

        Raises:
            ConfigError: Validations have no such figure, or there are none.
        """
        self._check(run)
        earlier: list[Best] = []
        with run.ranks.together("reading the validations of earlier starts"):
            if run.ranks.is_main:
                earlier = list(_measured(run, self._metric))
        for one in run.ranks.from_main(earlier) or []:
            self._take(one)
        self._end_if_none_are_better(run)

    def _check(self, run: Run) -> None:
        """Find out what the figure is.

        Raises:
            ConfigError: There is no such figure in this run.
        """
        tasks = run.trainer.tasks
        if self._metric.startswith(OF_TASKS) and tasks is not None:
            self._smaller_is_better = not tasks.directions[self._metric.removeprefix(OF_TASKS)]
            return
        there = ["validation_loss", "validation_perplexity"]
        there += [f"validation_{name}" for name in run.learner.judging.reported]
        if run.trainer.valid_loader is None or self._metric not in there:
            problem = "there is no validation data" if run.trainer.valid_loader is None else f"there are {there}"
            raise ConfigError(
                f"checkpoint.keep_best is {self._metric!r}, a figure of validations, but {problem}",
                hint="name one of these, and data.valid or a share for validation in data.split",
            )

    @override
    def after_validation(self, run: Run, metrics: ValidationMetrics) -> None:
        """Save if it is the best one.

        Raises:
            CheckpointError: The checkpoint could not be written.
        """
        if not self._metric.startswith(OF_TASKS):
            self._judge(run, metrics)

    @override
    def after_tasks(self, run: Run, metrics: TaskMetrics) -> None:
        """Save if it is the best one; raises as `after_validation`."""
        if self._metric.startswith(OF_TASKS):
            self._judge(run, metrics)

    def _judge(self, run: Run, metrics: ValidationMetrics | TaskMetrics) -> None:
        value = named_values(metrics)[self._metric]
        this = Best(self._metric, math.nan if value is None else value, metrics.step)
        if self._take(this):
            self._save(run, this)
        self._end_if_none_are_better(run)

    def _take(self, this: Best) -> bool:
        """Count a validation; returns whether it is the best so far."""
        sign = -1 if self._smaller_is_better else 1
        is_best = math.isfinite(this.value) and (self._best is None or sign * this.value > sign * self._best.value)
        self._num_worse = 0 if is_best else self._num_worse + 1
        self._best = this if is_best else self._best
        return is_best

    def _end_if_none_are_better(self, run: Run) -> None:
        if self._patience and self._num_worse >= self._patience:
            before = "" if self._best is None else f" than {self._best.value:.6g} (step {self._best.step})"
            measurements = "evaluations" if self._metric.startswith(OF_TASKS) else "validations"
            run.finish_early(f"{self._metric} has not become better{before} in {self._num_worse} {measurements}")

    def _save(self, run: Run, best: Best) -> None:
        """Write the weights, and remove those that were the best before. Collective: all ranks."""
        if best.step == 0:
            return  # the weights that the run has started from
        published = begin_save(
            run.folder.best,
            chunks=run.learner.model,
            optimizer=None,
            counters=run.counters,
            config=run.config,
            layout=run.learner.layout,
            companions=run.companions,
            replace_older=False,
            part=run.part,
        ).wait()
        with run.ranks.together("noting which checkpoint is the best"):
            if run.ranks.is_main:
                replace_text(run.folder.best_record, json.dumps(asdict(best)) + "\n")
                keep_newest(run.folder.best, 1, published)
                logger.info("best so far: %s %.6g after step %d", best.metric, best.value, best.step)


def _measured(run: Run, metric: str) -> Iterator[Best]:
    """Yield the figure of each validation, or measurement on tasks, that metrics.jsonl has."""
    for _, values in read_metrics(run.folder.metrics):
        step, value = values.get("step"), values.get(metric)
        if isinstance(step, int) and "loss" not in values and metric in values:
            yield Best(metric, float(value) if isinstance(value, int | float) else math.nan, step)
