"""All rules of a configuration applied, so that every problem is found at once.

A rule is left out where an option that it reads is already known to be wrong: a typing mistake is reported once, not
once per rule that stumbles over it.
"""

from collections.abc import Collection

from megatron_7b.config import (
    adapter_rules,
    architecture_rules,
    distillation_rules,
    evaluation_rules,
    expert_rules,
    finetune_rules,
    head_rules,
    model_rules,
    optimizer_rules,
    run_rules,
    window_rules,
)
from megatron_7b.config.problems import Problem
from megatron_7b.config.ranges import find_out_of_range
from megatron_7b.config.rule import Case
from megatron_7b.config.schema import RunConfig

_MODULES = (
    model_rules,
    architecture_rules,
    window_rules,
    expert_rules,
    head_rules,
    optimizer_rules,
    adapter_rules,
    finetune_rules,
    distillation_rules,
    run_rules,
    evaluation_rules,
)
"""Those that have rules, in the order in which problems are told."""


def find_conflicts(
    config: RunConfig,
    *,
    world_size: int | None = None,
    require_data: bool = False,
    ignore: Collection[str] = (),
) -> list[Problem]:
    """Return all values out of range and all impossible combinations.

    Args:
        config: What to check.
        world_size: Number of ranks, or None where it is not known yet.
        require_data: Also ask for a training corpus, and for the files that options name to exist.
        ignore: Paths whose values are already known to be wrong; rules that read them are left out.
    """
    case = Case(config, world_size)
    problems = [problem for problem in find_out_of_range(case) if not _touches((problem.path,), ignore)]
    faulty = {*ignore, *(problem.path for problem in problems)}
    rules = [one for module in _MODULES for one in module.RULES]
    if require_data:
        rules += [*adapter_rules.FILE_RULES, *distillation_rules.FILE_RULES, *run_rules.FILE_RULES]
    for candidate in rules:
        if not _touches(candidate.reads, faulty):
            problems.extend(candidate.check(case))
    return problems


def _touches(reads: Collection[str], faulty: Collection[str]) -> bool:
    return any(path == bad or bad.startswith(f"{path}.") for path in reads for bad in faulty)
