"""The adapter of the method bottleneck. Imports no torch before a model is built."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_7b.adapter.bottleneck.rows import bottleneck_rows
from megatron_7b.adapter.targets import Projection, is_trained_as_a_whole, targeted
from megatron_7b.config.schema import RunConfig
from megatron_7b.model.adapter import Adapter
from megatron_7b.model.parameters import Parameter, ParameterTable

if TYPE_CHECKING:
    from megatron_7b.model.kernels import Kernels
    from megatron_7b.model.kinds.chunk import ModelChunk


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
