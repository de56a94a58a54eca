"""The parameters of bottleneck adapters. Imports no torch.

Source: Houlsby et al. 2019, after attention and MLP; Pfeiffer et al. 2021, after the MLP alone. They begin as nothing:
the up-projection is zero.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_7b.adapter.rows import own_row, with_uniform_start
from megatron_7b.adapter.targets import Projection, is_trained_as_a_whole, targeted
from megatron_7b.config.schema import RunConfig
from megatron_7b.model.adapter import Adapter
from megatron_7b.model.parameters import Parameter, ParameterTable

if TYPE_CHECKING:
    from megatron_7b.model.kernels import Kernels
    from megatron_7b.model.kinds.chunk import ModelChunk

DOWN, UP = "bottleneck_down", "bottleneck_up"


def build_bottleneck(config: RunConfig) -> Adapter:
    """Return the adapter of `adapter.method` bottleneck."""
    model, adapter = config.model, config.adapter

    def chosen(table: ParameterTable) -> list[Projection]:
        return targeted(table, model, adapter.target_modules, fits=lambda row: row.tp_dim == 1)

    def rows(table: ParameterTable) -> Iterator[Parameter]:
        for projection in chosen(table):
            yield from bottleneck_rows(projection, adapter.bottleneck_size)

    def kernels(base: "Kernels") -> "Kernels":
        from megatron_7b.adapter.adapted_linear import adapted

        return adapted(base)

    def attach(chunk: "ModelChunk", base: ParameterTable) -> None:
        from megatron_7b.adapter.bottleneck.layers import attach_bottlenecks

        attach_bottlenecks(chunk, base, chosen(base), adapter)

    return Adapter(
        kernels=kernels,
        rows=rows,
        trains_too=lambda row: is_trained_as_a_whole(row, adapter),
        attach=attach,
        is_apart=True,
    )


def bottleneck_rows(projection: Projection, size: int) -> Iterator[Parameter]:
    """Yield the rows of the MLP after one linear layer, which every tensor rank holds whole."""
    width = projection.weight.shape[0]
    yield with_uniform_start(own_row(projection, f"{DOWN}.weight", (size, width), None, suffix=""), width)
    yield own_row(projection, f"{DOWN}.bias", (size,), None, suffix="")
    yield own_row(projection, f"{UP}.weight", (width, size), None, suffix="")
    yield own_row(projection, f"{UP}.bias", (width,), None, suffix="")
