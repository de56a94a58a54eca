"""Small MLPs after linear layers that write into the residual stream."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor
from torch.nn import Module, functional

from megatron_7b.adapter.adapted_linear import (
    AdaptedLinear,
    Addition,
    Place,
    adapted_layers,
    dropped,
    local_parameter,
)
from megatron_7b.adapter.bottleneck.rows import DOWN, UP, bottleneck_rows
from megatron_7b.adapter.targets import Projection
from megatron_7b.config.adapters import AdapterConfig
from megatron_7b.model.kinds.chunk import ModelChunk
from megatron_7b.model.parameters import ParameterTable

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
}


class _Linear(Module):
    """A linear layer that every tensor rank holds whole; it is called, as hooks of gradient buffers expect."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.get_parameter("weight"), self.get_parameter("bias"))


class Bottleneck(Addition):
    """Adds up(activation(down(h))) to the outputs h, biases included.

    Outputs are whole on every tensor rank, or whole positions of a part of the sequence. So each rank computes all of
    it for what it has, and nothing is communicated.

    Args:
        projection: The linear layer.
        adapter: The section of the configuration.
        place: Where the layer is.
    """

    def __init__(self, projection: Projection, adapter: AdapterConfig, place: Place) -> None:
        super().__init__()
        self.dropout = adapter.dropout
        self.sequence_parallel = place.sequence_parallel
        self.activation = _ACTIVATIONS[adapter.bottleneck_activation]
        self._name = projection.name
        self.add_module(projection.name, Module())
        for part in (DOWN, UP):
            self.get_submodule(projection.name).add_module(part, _Linear())
        for row in bottleneck_rows(projection, adapter.bottleneck_size):
            *_, part, name = row.name.split(".")
            self._part(part).register_parameter(name, local_parameter(row, place))

    def forward(
        self,
        linear: AdaptedLinear,  # noqa: ARG002 - this and the next are for what looks at inputs and weight
        x: Tensor,  # noqa: ARG002
        output: Tensor,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the outputs with what is added, [s, b, h] or [s/tp, b, h], and no bias that is left to be added.

        Collective: none.
        """
        hidden = output if bias is None else output + bias
        read = dropped(hidden, self.dropout, is_shard=self.sequence_parallel) if self.training else hidden
        return hidden + self._part(UP)(self.activation(self._part(DOWN)(read))), None

    def _part(self, name: str) -> Module:
        return self.get_submodule(f"{self._name}.{name}")


def attach_bottlenecks(
    chunk: ModelChunk, base: ParameterTable, chosen: Sequence[Projection], adapter: AdapterConfig
) -> None:
    """Put an MLP after every chosen linear layer of a chunk. Collective: none."""
    by_weight = {one.weight.name: one for one in chosen}
    for core_name, linear in adapted_layers(chunk):
        projection = by_weight.get(base.by_core_name(core_name).name)
        if projection is not None:
            linear.adapter = Bottleneck(projection, adapter, Place.of(chunk, is_column=False))
