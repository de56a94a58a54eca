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

_OBJECTIVES = ("causal", "chat", "masked", "text_classification", "token_classification", "question_answering")
"""Those whose predictions are probabilities, or numbers, that a teacher has as well."""

_OWN_LAYOUT = "distillation.teacher_tensor_model_parallel_size"

_WEIGHTS = ("distillation.hidden_weight", "distillation.attention_weight")


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
    for name in ("teacher_dtype", "teacher_tensor_model_parallel_size", "hidden", "attention"):
        if getattr(given, name) != getattr(DistillationConfig, name):
            yield case.problem(f"distillation.{name}", "only applies with distillation.teacher")
    if case.config.objective_name != "causal":
        yield case.problem("distillation.cached_logits", "only applies with the objective causal")
    if case.config.parallel.context_parallel_size > 1:
        yield case.problem("distillation.cached_logits", "needs parallel.context_parallel_size 1")


@rule(_OWN_LAYOUT, "distillation.teacher", "parallel.expert_model_parallel_size", *LAYOUT)
def _replicas_share_a_teacher(case: Case) -> Iterator[Problem]:
    own, parallel = case.config.distillation.teacher_tensor_model_parallel_size, case.config.parallel
    if own is None or case.config.distillation.teacher is None:
        return
    tensor = parallel.tensor_model_parallel_size
    if own <= 0 or own % tensor:
        yield case.problem(_OWN_LAYOUT, f"must be a multiple of parallel.tensor_model_parallel_size = {tensor}")
    elif case.world_size is not None and case.data_parallel_size % (own // tensor):
        count = case.data_parallel_size
        yield case.problem(
            _OWN_LAYOUT,
            f"is shared by {own // tensor} replicas of the student, which must divide the {count} that there are",
        )
    for name in ("context_parallel_size", "expert_model_parallel_size"):
        if getattr(parallel, name) > 1:
            yield case.problem(_OWN_LAYOUT, f"needs parallel.{name} 1")


@rule(_OWN_LAYOUT, "distillation.hidden", "distillation.attention", "model.architecture", "model.head")
def _words_travel_and_layers_do_not(case: Case) -> Iterator[Problem]:
    given, model = case.config.distillation, case.config.model
    if given.teacher_tensor_model_parallel_size is None:
        return
    if given.compares_layers:
        yield case.problem(_OWN_LAYOUT, "layers are compared rank by rank: needs the student's layout")
    if model.traits.kind != "decoder" or model.has_head:
        yield case.problem(_OWN_LAYOUT, "only applies to decoders that predict tokens")


@rule("distillation.jsd_beta", "distillation.loss")
def _beta_is_of_jsd(case: Case) -> Iterator[Problem]:
    given = case.config.distillation
    if given.loss != "jsd" and given.jsd_beta != DistillationConfig.jsd_beta:
        yield case.problem("distillation.jsd_beta", f"only applies with distillation.loss jsd, not {given.loss}")


@rule("distillation.hidden", "distillation.attention", "distillation.layer_map", *_WEIGHTS)
def _weights_are_of_what_is_compared(case: Case) -> Iterator[Problem]:
    given = case.config.distillation
    if given.hidden_weight != DistillationConfig.hidden_weight and not given.hidden:
        yield case.problem("distillation.hidden_weight", "only applies with distillation.hidden True")
    if given.attention_weight != DistillationConfig.attention_weight and given.attention == "none":
        yield case.problem("distillation.attention_weight", "only applies with distillation.attention kl or scores")
    if given.layer_map and not given.compares_layers:
        yield case.problem("distillation.layer_map", "only applies with distillation.hidden or distillation.attention")


@rule("distillation.attention", "model.architecture")
def _attention_is_of_encoders(case: Case) -> Iterator[Problem]:
    kind = case.config.model.traits.kind
    if case.config.distillation.attention != "none" and kind != "encoder":
        yield case.problem("distillation.attention", f"only applies to encoders, not to a model of kind {kind}")


@rule("distillation.hidden", "distillation.attention", "adapter.method")
def _layers_are_trained(case: Case) -> Iterator[Problem]:
    if case.config.distillation.compares_layers and case.config.adapter.is_used:
        yield case.problem("distillation.hidden", "needs a model that is trained as a whole: adapter.method none")


@rule("distillation.hidden", "distillation.attention", "parallel.recompute_granularity")
def _layers_are_seen_once(case: Case) -> Iterator[Problem]:
    given, recomputed = case.config.distillation, case.config.parallel.recompute_granularity
    if recomputed == "full" and given.hidden:
        yield case.problem("distillation.hidden", "needs parallel.recompute_granularity none or selective")
    if recomputed != "none" and given.attention != "none":
        yield case.problem("distillation.attention", "needs parallel.recompute_granularity none")


@rule("distillation.teacher", "objective.name")
def _tokens_are_predicted(case: Case) -> Iterator[Problem]:
    name = case.config.objective_name
    if case.config.distillation.is_used and name not in _OBJECTIVES:
        yield case.problem(
            "distillation.teacher",
            f"only applies with the objectives {', '.join(_OBJECTIVES[:-1])} and {_OBJECTIVES[-1]}, not {name}",
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
