"""What a model is trained for: which samples it gets, which inputs it takes of them, which sums are made of its output.

Training, validation and evaluation share an objective, so that their losses are the same quantity. To add one, put it
into `BUILDERS`, and its name into `config.objectives.OBJECTIVES`.
"""

from collections.abc import Callable

from megatron_7b.config.objectives import OBJECTIVES
from megatron_7b.config.schema import RunConfig
from megatron_7b.objective.objective import Objective

__all__ = ["BUILDERS", "Objective", "build_objective", "objective_name"]


def _causal() -> Objective:
    from megatron_7b.objective.causal import CausalLanguageModeling

    return CausalLanguageModeling()


def _masked() -> Objective:
    from megatron_7b.objective.masked import MaskedLanguageModeling

    return MaskedLanguageModeling()


BUILDERS: dict[str, Callable[[], Objective]] = {"causal": _causal, "masked": _masked}


def objective_name(config: RunConfig) -> str:
    """Return the name of a run's objective: the configured one, or the usual one of its kind of model."""
    kind = config.model.traits.kind
    return config.objective.name or next(name for name, kinds in OBJECTIVES.items() if kind in kinds)


def build_objective(config: RunConfig) -> Objective:
    """Return the objective of a run."""
    return BUILDERS[objective_name(config)]()
