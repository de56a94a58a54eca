"""Rules for learning from a teacher."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from megatron_7b.config.distillation_config import DistillationConfig
from megatron_7b.config.problems import Problem
from megatron_7b.config.rule import LAYOUT, Case, Rule, adder_to

RULES: list[Rule] = []
rule = adder_to(RULES)
FILE_RULES: list[Rule] = []
"""Rules that look at the file system: for a run that is about to start."""
file_rule = adder_to(FILE_RULES)

_OBJECTIVES = ("causal", "chat")
"""Those whose loss is a sum over tokens that a decoder predicts."""


@rule("distillation.teacher", *(f"distillation.{field.name}" for field in dataclasses.fields(DistillationConfig)))
def _options_need_a_teacher(case: Case) -> Iterator[Problem]:
    given = case.config.distillation
    if given.is_used:
        return
    for field in dataclasses.fields(given):
        if getattr(given, field.name) != field.default:
            yield case.problem(f"distillation.{field.name}", "only applies with distillation.teacher")


@rule("distillation.teacher", "distillation.cached_logits", "distillation.teacher_dtype", *LAYOUT)
def _what_a_teacher_has_said_needs_no_teacher(case: Case) -> Iterator[Problem]:
    given = case.config.distillation
    if given.cached_logits is None:
        return
    if given.teacher is not None:
        yield case.problem("distillation.cached_logits", "takes the place of distillation.teacher: name one of them")
    if given.teacher_dtype != "auto":
        yield case.problem("distillation.teacher_dtype", "only applies with distillation.teacher")
    if case.config.objective_name != "causal":
        yield case.problem("distillation.cached_logits", "only applies with the objective causal")
    if case.config.parallel.context_parallel_size > 1:
        yield case.problem("distillation.cached_logits", "needs parallel.context_parallel_size 1")


@rule("distillation.jsd_beta", "distillation.loss")
def _beta_is_of_jsd(case: Case) -> Iterator[Problem]:
    given = case.config.distillation
    if given.loss != "jsd" and given.jsd_beta != DistillationConfig.jsd_beta:
        yield case.problem("distillation.jsd_beta", f"only applies with distillation.loss jsd, not {given.loss}")


@rule("distillation.teacher", "objective.name")
def _tokens_are_predicted(case: Case) -> Iterator[Problem]:
    name = case.config.objective_name
    if case.config.distillation.is_used and name not in _OBJECTIVES:
        yield case.problem(
            "distillation.teacher", f"only applies with the objectives {' and '.join(_OBJECTIVES)}, not {name}"
        )


@rule("distillation.teacher", "finetune.label_smoothing")
def _labels_are_whole(case: Case) -> Iterator[Problem]:
    if case.config.distillation.is_used and case.config.finetune.label_smoothing:
        yield case.problem(
            "finetune.label_smoothing", "must be 0 with distillation.teacher, whose probabilities are smooth already"
        )


@file_rule("distillation.teacher")
def _teacher_exists(case: Case) -> Iterator[Problem]:
    teacher = case.config.distillation.teacher
    if teacher is not None and not Path(teacher).exists():
        yield case.problem("distillation.teacher", "no such checkpoint or Hugging Face folder")
