"""What a model with a head takes of weights that have another head, or none."""

from dataclasses import dataclass, replace

from megatron_7b.config.schema import ModelConfig
from megatron_7b.model.kinds import parameter_table

HEAD_FIELDS = ("head", "num_labels", "labels", "problem_type")
_POOLER = ("pooler.weight", "pooler.bias")


@dataclass(frozen=True)
class HeadDifference:
    """How the parameters of a model differ from those of the weights that it starts from, where only the head does.

    Attributes:
        fresh: Names of parameters that begin with their initial values, even if the weights have some of the name.
        may_lack: Names of parameters that do so if the weights have none of the name.
        left: Names of what the weights may have and the model has not.
    """

    fresh: frozenset[str] = frozenset()
    may_lack: frozenset[str] = frozenset()
    left: frozenset[str] = frozenset()


def find_head_difference(model: ModelConfig, start: ModelConfig) -> HeadDifference:
    """Return what of a model with a head is fresh, and what stays behind of the weights.

    Args:
        model: The model.
        start: That of the weights.
    """
    if not model.has_head:
        return HeadDifference()
    own = parameter_table(model, 1)
    heads = frozenset(name for name, row in own.items() if row.is_task_head).difference(_POOLER)
    without = replace(model, head="none", add_binary_head=model.traits.kind == "encoder")
    others = parameter_table(without, 1).keys() | {"task_head.weight", "task_head.bias"}
    return HeadDifference(
        fresh=frozenset() if has_same_head(model, start) else heads,
        may_lack=frozenset(_POOLER) & own.keys(),
        left=frozenset(others - own.keys()),
    )


def has_same_head(model: ModelConfig, other: ModelConfig) -> bool:
    """Return whether two models have heads whose outputs mean the same."""
    return all(getattr(model, name) == getattr(other, name) for name in HEAD_FIELDS)
