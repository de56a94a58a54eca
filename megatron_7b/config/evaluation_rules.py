"""Rules for measuring a run on tasks while it trains."""

import dataclasses
from collections.abc import Iterator

from megatron_7b.config.options import get_value
from megatron_7b.config.problems import Problem
from megatron_7b.config.rule import Case, Rule, adder_to
from megatron_7b.config.schema import TelemetryConfig

RULES: list[Rule] = []
rule = adder_to(RULES)

_OF_TASKS = {
    f"telemetry.{field.name}": field.default
    for field in dataclasses.fields(TelemetryConfig)
    if field.name.startswith("eval_tasks_")
}
"""Defaults of the options that say how tasks are measured."""
_DIVIDING = ("parallel.virtual_pipeline_model_parallel_size", "parallel.expert_model_parallel_size")
"""What divides a model in ways that only training knows."""


@rule("checkpoint.keep_best", "telemetry.eval_tasks")
def _best_of_tasks_needs_tasks(case: Case) -> Iterator[Problem]:
    best = case.config.checkpoint.keep_best
    if best is not None and best.startswith("eval/") and not case.config.telemetry.eval_tasks:
        yield case.problem("checkpoint.keep_best", f"{best} needs telemetry.eval_tasks, which names the tasks")


@rule("telemetry.eval_tasks", "model.architecture", "model.head", "objective.name", *_DIVIDING)
def _tasks_need_what_generates(case: Case) -> Iterator[Problem]:
    config, path = case.config, "telemetry.eval_tasks"
    if not config.telemetry.eval_tasks:
        return
    if config.model.has_head or config.model.traits.kind != "decoder" or config.objective_name == "embedding":
        yield case.problem(path, "tasks are measured on decoders that predict the next token")
    for option in _DIVIDING:
        number = get_value(config, option) or 1
        if number != 1:
            yield case.problem(
                path,
                f"tasks cannot be measured during a run with {option} {number}: leave one of them out, and measure its "
                "checkpoints with `evaluate --tasks`",
            )


@rule("telemetry.eval_tasks", *_OF_TASKS)
def _options_of_tasks_need_tasks(case: Case) -> Iterator[Problem]:
    if case.config.telemetry.eval_tasks:
        return
    for path, default in _OF_TASKS.items():
        if get_value(case.config, path) != default:
            yield case.problem(path, "only applies with telemetry.eval_tasks")
