"""The adapter of the methods that are low-rank updates. Imports no torch before a model is built."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_7b.adapter.low_rank.rows import low_rank_rows
from megatron_7b.adapter.targets import is_trained_as_a_whole, targeted
from megatron_7b.config.schema import RunConfig
from megatron_7b.model.adapter import Adapter
from megatron_7b.model.parameters import Parameter, ParameterTable

if TYPE_CHECKING:
    from megatron_7b.model.kernels import Kernels
    from megatron_7b.model.kinds.chunk import ModelChunk


def build_low_rank(config: RunConfig) -> Adapter:
    """Return the adapter of `adapter.method` lora, dora, qlora or adalora."""
    model, adapter = config.model, config.adapter

    def rows(table: ParameterTable) -> Iterator[Parameter]:
        for projection in targeted(table, model, adapter.target_modules):
            yield from low_rank_rows(projection, adapter)

    def kernels(base: "Kernels") -> "Kernels":
        from megatron_7b.adapter.adapted_linear import adapted

        if adapter.method == "qlora":
            from megatron_7b.adapter.quantized import quantized

            base = quantized(base)
        return adapted(base)

    def attach(chunk: "ModelChunk", base: ParameterTable) -> None:
        from megatron_7b.adapter.low_rank.layers import attach_updates

        attach_updates(chunk, base, targeted(base, model, adapter.target_modules), model, adapter)

    def settle(chunk: "ModelChunk") -> None:
        from megatron_7b.adapter.low_rank.layers import take_norms

        take_norms(chunk)

    return Adapter(
        kernels=kernels,
        rows=rows,
        trains_too=lambda row: is_trained_as_a_whole(row, adapter),
        attach=attach,
        settle=settle,
        is_apart=True,
    )
