"""Rules for adapters."""

from collections.abc import Iterator
from dataclasses import fields

from megatron_7b.config.adapters import AdapterConfig, methods_with
from megatron_7b.config.problems import Problem
from megatron_7b.config.rule import Case, Rule, adder_to

RULES: list[Rule] = []
rule = adder_to(RULES)

FILE_RULES: list[Rule] = []
"""Rules for a run that is about to start."""
file_rule = adder_to(FILE_RULES)


@rule("adapter")
def _options_belong_to_the_method(case: Case) -> Iterator[Problem]:
    adapter = case.config.adapter
    for field in fields(AdapterConfig):
        if field.name == "method" or getattr(adapter, field.name) == field.default:
            continue
        methods = methods_with(field.name)
        if not adapter.is_used:
            wanted = "needs adapter.method" if methods is None else f"needs adapter.method {' | '.join(methods)}"
            yield case.problem(f"adapter.{field.name}", f"{wanted}; without an adapter the model itself is trained")
        elif methods is not None and adapter.method not in methods:
            yield case.problem(f"adapter.{field.name}", f"needs adapter.method {' | '.join(methods)}")


@rule("adapter.method", "adapter.initial_rank", "adapter.target_rank")
def _ranks_fall(case: Case) -> Iterator[Problem]:
    adapter = case.config.adapter
    if adapter.method == "adalora" and adapter.target_rank > adapter.initial_rank:
        yield case.problem(
            "adapter.target_rank", f"must be at most adapter.initial_rank = {adapter.initial_rank}: ranks only fall"
        )


@rule("adapter.method", "adapter.tinit", "adapter.tfinal", "training.train_steps")
def _ranks_have_time_to_fall(case: Case) -> Iterator[Problem]:
    adapter, steps = case.config.adapter, case.config.training.train_steps
    if adapter.method == "adalora" and adapter.tinit + adapter.tfinal >= steps:
        yield case.problem(
            "adapter.tinit",
            f"tinit + tfinal = {adapter.tinit + adapter.tfinal} must be below training.train_steps = {steps}: ranks "
            "fall in between",
        )


@rule("adapter.method", "training.early_stop_validations")
def _ranks_fall_to_the_end(case: Case) -> Iterator[Problem]:
    if case.config.adapter.method == "adalora" and case.config.training.early_stop_validations:
        yield case.problem(
            "training.early_stop_validations",
            "must be 0 with adapter.method adalora, whose ranks fall until the last step",
        )


@rule("adapter.method", "precision.optimizer_state_dtype")
def _importance_is_kept_beside_the_state(case: Case) -> Iterator[Problem]:
    if case.config.adapter.method == "adalora" and case.config.precision.optimizer_state_dtype != "fp32":
        yield case.problem(
            "precision.optimizer_state_dtype", "does not go with adapter.method adalora, which measures FP32 state"
        )


@rule("adapter.method", "precision.fp8")
def _four_bits_are_not_eight(case: Case) -> Iterator[Problem]:
    if case.config.adapter.method == "qlora" and case.config.precision.fp8 != "none":
        yield case.problem("precision.fp8", "does not go with adapter.method qlora, whose weights have four bits")


@rule("adapter.target_modules")
def _all_linear_is_all(case: Case) -> Iterator[Problem]:
    names = case.config.adapter.target_modules
    if "all-linear" in names and len(names) > 1:
        yield case.problem("adapter.target_modules", "all-linear leaves nothing else to be named")


@rule("adapter.method", "precision.fp8_param_gather")
def _frozen_parameters_are_not_gathered(case: Case) -> Iterator[Problem]:
    if case.config.adapter.is_used and case.config.precision.fp8_param_gather:
        yield case.problem("precision.fp8_param_gather", "does not go with an adapter, whose model is not updated")


@file_rule("adapter.method", "checkpoint.initialize_from")
def _an_adapter_has_a_base(case: Case) -> Iterator[Problem]:
    if case.config.adapter.is_used and case.config.checkpoint.initialize_from is None:
        yield case.problem(
            "checkpoint.initialize_from", f"adapter.method {case.config.adapter.method} needs it: the model to adapt"
        )
