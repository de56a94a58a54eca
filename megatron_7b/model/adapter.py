"""The place for adapters: what is added to a model of any kind, and which of its parameters are then trained."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from megatron_7b.model.kernels import Kernels
from megatron_7b.model.parameters import Parameter, ParameterTable


def _nothing(_parameter: Parameter) -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Parameters beside those of a model, which learn while the model stays as it is.

    What is not trained has neither a gradient buffer nor optimizer state. Checkpoints hold all parameters.

    Attributes:
        kernels: Returns classes of layers that have the further parameters, given those that the model is built from.
        rows: Yields a row per further parameter, given the model's own rows. The core name of each is what
            megatron-core calls it: that of the layer's weight with another end, `….linear_proj.lora_a`.
        trains_too: Which of the model's own parameters are trained as well.
    """

    kernels: Callable[[Kernels], Kernels]
    rows: Callable[[ParameterTable], Iterable[Parameter]]
    trains_too: Callable[[Parameter], bool] = _nothing

    def extended(self, table: ParameterTable) -> ParameterTable:
        """Return a model's table with the further rows."""
        return ParameterTable([*table.values(), *self.rows(table)])

    def own_names(self, table: ParameterTable) -> frozenset[str]:
        """Return the names of the further parameters, given the model's own rows."""
        return frozenset(row.name for row in self.rows(table))
