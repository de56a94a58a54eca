"""The tasks that a run is measured on as it trains: found, and their data read, before its model is built."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_7b.config.schema import RunConfig
from megatron_7b.errors import ConfigError
from megatron_7b.evaluation.harness.running import HarnessOptions, LoadedTasks, load_tasks
from megatron_7b.tokenizer import Tokenizer
from megatron_7b.tokenizer.chat_template import has_chat_template
from megatron_7b.training.agreement import Ranks

logger = logging.getLogger(__name__)

OF_TASKS = "eval/"
"""Beginning of the names that figures of tasks have in metrics.jsonl."""
_SHOWN = 8


@dataclass(frozen=True)
class RunTasks:
    """Tasks of `telemetry.eval_tasks`.

    Attributes:
        options: Which, and how.
        tokenizer: That of the data.
        directions: Whether a larger figure is the better one, by the name of the measure: `arc_easy/acc`.
        loaded: The tasks, on the main rank.
    """

    options: HarnessOptions
    tokenizer: Tokenizer
    directions: Mapping[str, bool]
    loaded: LoadedTasks | None


def task_options(config: RunConfig) -> HarnessOptions:
    """Return what the configuration says about tasks; it names some."""
    telemetry = config.telemetry
    return HarnessOptions(
        tasks=tuple(name for entry in telemetry.eval_tasks for name in entry.split(",") if name),
        include_path=tuple(map(Path, telemetry.eval_tasks_include_path)),
        task_data=None if telemetry.eval_tasks_data is None else Path(telemetry.eval_tasks_data),
        num_fewshot=telemetry.eval_tasks_num_fewshot,
        limit=telemetry.eval_tasks_limit,
        apply_chat_template=telemetry.eval_tasks_chat_template,
        batch_size=telemetry.eval_tasks_batch_size,
    )


def open_tasks(config: RunConfig, ranks: Ranks, tokenizer: Tokenizer | None) -> RunTasks | None:
    """Find the tasks of a run and read their data; None if it has none.

    Collective: all ranks.

    Raises:
        ConfigError: A task is unknown, asks for texts that are too long, or its data are not on this machine; the
            tokenizer is not known, or lacks what is needed; or the best weights are to be kept by another figure.
    """
    if not config.telemetry.eval_tasks:
        return None
    if tokenizer is None:
        raise ConfigError(
            "telemetry.eval_tasks needs the tokenizer, which is not known",
            hint="set data.tokenizer, or have the corpus name one: `megatron-7b data adopt PREFIX --tokenizer DIR`",
        )
    if tokenizer.eod_id is None:
        raise ConfigError("telemetry.eval_tasks needs a token that ends a text, which the tokenizer has not")
    options = task_options(config)
    if options.apply_chat_template and not has_chat_template(tokenizer):
        raise ConfigError(
            "telemetry.eval_tasks_chat_template is true, but the tokenizer has no chat template",
            hint="leave it out: questions are then asked as plain text",
        )
    loaded, directions = None, dict[str, bool]()
    with ranks.together("loading the tasks of telemetry.eval_tasks"):
        if ranks.is_main:
            loaded = load_tasks(options)
            loaded.check_lengths(config.model.max_position_embeddings)
            directions = loaded.directions()
            _check_best(config.checkpoint.keep_best, directions)
    return RunTasks(options, tokenizer, ranks.from_main(directions), loaded)


def _check_best(metric: str | None, directions: Mapping[str, bool]) -> None:
    """Refuse to keep the best weights by a figure that the tasks do not give.

    Raises:
        ConfigError: It is none of theirs.
    """
    if metric is not None and metric.startswith(OF_TASKS) and metric.removeprefix(OF_TASKS) not in directions:
        there = [f"{OF_TASKS}{name}" for name in sorted(directions)]
        raise ConfigError(
            f"checkpoint.keep_best is {metric!r}, which telemetry.eval_tasks does not give",
            hint=f"there are {', '.join(there[:_SHOWN])}",
        )
