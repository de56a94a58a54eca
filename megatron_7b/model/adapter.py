"""The place for adapters: what is added to a model of any kind, and which of its parameters are then trained."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_7b.model.parameters import Parameter, ParameterTable

if TYPE_CHECKING:
    from megatron_7b.model.kernels import Kernels
    from megatron_7b.model.kinds.chunk import ModelChunk


def _nothing(_parameter: Parameter) -> bool:
    return False


def _nothing_to_attach(_chunk: "ModelChunk", _base: ParameterTable) -> None:
    pass


def _nothing_to_settle(_chunk: "ModelChunk") -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Parameters beside those of a model, which learn while the model stays as it is.

    What is not trained has neither a gradient buffer nor optimizer state.

    Attributes:
        kernels: Returns classes of layers that have the further parameters, given those that the model is built from.
        rows: Yields a row per further parameter, given the model's own rows. The core name of each is what
            megatron-core calls it: that of the layer's weight with another end, `….linear_proj.lora_a`.
        trains_too: Which of the model's own parameters are trained as well.
        attach: Gives the layers of a built chunk their further parameters, if the classes do not make them; the second
            argument are the model's own rows.
        settle: Gives parameters that follow from the model's weights their first values, once these have been loaded.
            Collective: the tensor-parallel group.
        keeps_training: Whether the model is trained as it would be without it; otherwise it is frozen.
        is_apart: Whether checkpoints hold only what is trained, and name the model that it belongs to; otherwise they
            hold all parameters.
    """

    kernels: Callable[["Kernels"], "Kernels"]
    rows: Callable[[ParameterTable], Iterable[Parameter]]
    trains_too: Callable[[Parameter], bool] = _nothing
    attach: Callable[["ModelChunk", ParameterTable], None] = _nothing_to_attach
    settle: Callable[["ModelChunk"], None] = _nothing_to_settle
    keeps_training: bool = False
    is_apart: bool = False

    def extended(self, table: ParameterTable) -> ParameterTable:
        """Return a model's table with the further rows."""
        return ParameterTable([*table.values(), *self.rows(table)])

    def own_names(self, table: ParameterTable) -> frozenset[str]:
        """Return the names of the further parameters, given the model's own rows."""
        return frozenset(row.name for row in self.rows(table))

    def trained_names(self, table: ParameterTable) -> frozenset[str]:
        """Return the names of all parameters that are trained, given the model's own rows.

        The head of a task always is, and the pooler below it, which the model may not have had before.
        """
        has_task_head = any(row.is_task_head for row in table.values())
        of_head = {row.name for row in table.values() if row.is_task_head or row.name.startswith("pooler.")}
        chosen = {row.name for row in table.values() if self.trains_too(row)}
        return self.own_names(table) | chosen | (of_head if has_task_head else frozenset())
