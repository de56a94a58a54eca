"""Rules for what a task of fine-tuning can be asked to do."""

from collections.abc import Iterator

from megatron_7b.config.options import get_value, options
from megatron_7b.config.problems import Problem
from megatron_7b.config.rule import Case, Rule, adder_to

RULES: list[Rule] = []
rule = adder_to(RULES)

_OF_RECORDS = ("chat", "preference", "embedding", "sequence_to_sequence")
"""Objectives whose rows hold records; those of heads have a rule of their own."""
_SMOOTHED_LOSSES = ("sigmoid", "robust")

_OPTIONS_OF_TASKS: dict[str, tuple[str, ...]] = {
    "finetune.label_smoothing": ("chat", "sequence_to_sequence", "preference"),
    "finetune.train_on": ("chat",),
    "finetune.prompt_template": ("sequence_to_sequence",),
    "finetune.target_key": ("sequence_to_sequence",),
    "finetune.max_target_length": ("sequence_to_sequence",),
    "finetune.labels": ("text_classification", "token_classification"),
    "finetune.problem_type": ("text_classification",),
    "finetune.tag_scheme": ("token_classification",),
    "finetune.doc_stride": ("question_answering",),
    "finetune.may_lack_answer": ("question_answering",),
    "finetune.preference_loss": ("preference",),
    "finetune.beta": ("preference",),
    "finetune.desirable_weight": ("preference",),
    "finetune.undesirable_weight": ("preference",),
    "finetune.pooling": ("embedding",),
    "finetune.temperature": ("embedding",),
    "finetune.matryoshka_dims": ("embedding",),
}
"""Options that only some tasks know."""


@rule("finetune.task", *_OPTIONS_OF_TASKS)
def _options_belong_to_the_task(case: Case) -> Iterator[Problem]:
    task = case.config.finetune.task
    for path, tasks in _OPTIONS_OF_TASKS.items():
        if task not in tasks and get_value(case.config, path) != options()[path].default:
            yield case.problem(path, f"only applies with finetune.task {' | '.join(tasks)}, not {task or 'none'}")


@rule("objective.name", "parallel.context_parallel_size")
def _records_are_whole_on_a_rank(case: Case) -> Iterator[Problem]:
    if case.config.objective_name in _OF_RECORDS and case.config.parallel.context_parallel_size > 1:
        yield case.problem(
            "parallel.context_parallel_size", "must be 1 in fine-tuning, whose rows hold records that are kept apart"
        )


@rule("finetune.task", "finetune.preference_loss", "finetune.label_smoothing")
def _labels_of_pairs_may_be_wrong(case: Case) -> Iterator[Problem]:
    given = case.config.finetune
    if given.task != "preference" or not given.label_smoothing:
        return
    if given.preference_loss not in _SMOOTHED_LOSSES:
        yield case.problem(
            "finetune.label_smoothing",
            f"only applies with finetune.preference_loss {' | '.join(_SMOOTHED_LOSSES)}, not {given.preference_loss}",
        )
    elif given.label_smoothing >= 1 / 2:
        yield case.problem("finetune.label_smoothing", "must be below 0.5: most pairs must be the right way round")


@rule("finetune.task", "finetune.preference_loss", "finetune.desirable_weight", "finetune.undesirable_weight")
def _weights_are_of_labels(case: Case) -> Iterator[Problem]:
    given = case.config.finetune
    if given.task == "preference" and given.preference_loss != "kto":
        for name in ("desirable_weight", "undesirable_weight"):
            if getattr(given, name) != 1:
                yield case.problem(
                    f"finetune.{name}", f"only applies with finetune.preference_loss kto, not {given.preference_loss}"
                )
