"""Rules for the head of a model, which takes the place of its output layer."""

from collections import Counter
from collections.abc import Iterator

from megatron_7b.config.objectives import OF_HEADS
from megatron_7b.config.problems import Problem
from megatron_7b.config.rule import Case, Rule, adder_to

RULES: list[Rule] = []
rule = adder_to(RULES)

_KINDS = ("decoder", "encoder")
_BORDERS = 2
"""Outputs for question answering: how well a token begins an answer, and how well it ends one."""


@rule("model.architecture", "model.head", "model.add_binary_head")
def _head_fits_the_kind(case: Case) -> Iterator[Problem]:
    model = case.config.model
    if model.has_head and model.traits.kind not in _KINDS:
        yield case.problem("model.head", f"must be none in {model.architecture}, an encoder-decoder")
    if model.has_head and model.add_binary_head:
        yield case.problem("model.add_binary_head", f"must be False with model.head = {model.head}")


@rule("model.head", "model.num_labels", "model.labels", "model.problem_type")
def _labels_are_outputs(case: Case) -> Iterator[Problem]:
    model = case.config.model
    repeated = [label for label, count in Counter(model.labels).items() if count > 1]
    if repeated:
        yield case.problem("model.labels", f"names a class twice: {', '.join(repeated)}")
    elif model.labels and len(model.labels) != model.num_labels:
        yield case.problem("model.num_labels", f"must be {len(model.labels)}, as many as model.labels has")
    if model.head == "question_answering" and model.num_labels != _BORDERS:
        yield case.problem("model.num_labels", f"must be {_BORDERS} with model.head = question_answering")
    if model.problem_type != "single_label_classification" and model.head != "sequence_classification":
        yield case.problem("model.problem_type", "only applies with model.head = sequence_classification")


@rule("model.head", "objective.name")
def _head_has_its_objective(case: Case) -> Iterator[Problem]:
    head, name = case.config.model.head, case.config.objective.name
    needed = {objective: of for of, objective in OF_HEADS.items()}.get(name or "", "none" if name else head)
    if needed != head:
        wanted = f"must be {OF_HEADS[head]}, or left out, with model.head = {head}" if head != "none" else ""
        yield case.problem("objective.name", wanted or f"needs model.head = {needed}: --finetune.task {name} sets it")


@rule("model.head", "parallel.context_parallel_size")
def _heads_see_whole_sequences(case: Case) -> Iterator[Problem]:
    if case.config.model.has_head and case.config.parallel.context_parallel_size > 1:
        yield case.problem(
            "parallel.context_parallel_size",
            "must be 1 with a model.head, which reads single tokens: use tensor or data parallelism",
        )
