"""The best weights of a run by one of its validation figures, apart from the checkpoints that it continues from."""

import json
import logging
import math
from dataclasses import asdict, dataclass
from typing import override

from megatron_7b.checkpoint.publishing import keep_newest
from megatron_7b.checkpoint.save import begin_save
from megatron_7b.errors import ConfigError
from megatron_7b.files import replace_text
from megatron_7b.training.hooks import Hook
from megatron_7b.training.metrics import ValidationMetrics, named_values
from megatron_7b.training.run import Run

logger = logging.getLogger(__name__)

_SMALLER_IS_BETTER = ("loss", "perplexity")


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
    """Saves the weights after each validation that is better than all before it, as `RUN/best`.

    Args:
        metric: Name of a figure of validations, as metrics.jsonl has it. Of losses and perplexities the smallest is the
            best one, of all others the largest.
        patience: End the run after this many validations without a better one; 0: never.
    """

    def __init__(self, metric: str, patience: int = 0) -> None:
        self._metric, self._patience = metric, patience
        self._best: Best | None = None
        self._num_worse = 0

    @override
    def on_start(self, run: Run) -> None:
        """Find out how good the best weights of earlier starts are.

        Raises:
            ConfigError: Validations have no such figure, or there are none.
        """
        there = ["validation_loss", "validation_perplexity"]
        there += [f"validation_{name}" for name in run.learner.objective.reported]
        if run.trainer.valid_loader is None or self._metric not in there:
            problem = "there is no validation data" if run.trainer.valid_loader is None else f"there are {there}"
            raise ConfigError(
                f"checkpoint.keep_best is {self._metric!r}, a figure of validations, but {problem}",
                hint="name one of these, and data.valid or a share for validation in data.split",
            )
        found = None
        with run.ranks.together("reading which checkpoint is the best"):
            if run.ranks.is_main:
                found = _read(run, self._metric)
        self._best = run.ranks.from_main(found)

    @override
    def after_validation(self, run: Run, metrics: ValidationMetrics) -> None:
        """Save if it is the best one.

        Raises:
            CheckpointError: The checkpoint could not be written.
        """
        value = named_values(metrics)[self._metric]
        if value is None or not self._is_better(value):
            self._num_worse += 1
            if self._num_worse == self._patience:
                before = "" if self._best is None else f" than {self._best.value:.6g} (step {self._best.step})"
                run.finish_early(f"{self._metric} has not become better{before} in {self._patience} validations")
            return
        self._num_worse, self._best = 0, Best(self._metric, value, metrics.step)
        self._save(run, self._best)

    def _is_better(self, value: float) -> bool:
        if self._best is None or not math.isfinite(value):
            return math.isfinite(value)
        sign = -1 if self._metric.endswith(_SMALLER_IS_BETTER) else 1
        return sign * value > sign * self._best.value

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


def _read(run: Run, metric: str) -> Best | None:
    """Return what an earlier start has noted; of another figure it says nothing."""
    try:
        best = Best(**json.loads(run.folder.best_record.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (TypeError, ValueError) as error:
        logger.warning("%s cannot be read, and the search for the best begins anew: %s", run.folder.best_record, error)
        return None
    return best if best.metric == metric else None
