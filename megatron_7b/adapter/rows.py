"""Rows for what is added beside a linear layer. Imports no torch."""

import math
from dataclasses import replace

from megatron_7b.adapter.targets import Projection
from megatron_7b.model.parameters import Parameter, Shape


def own_row(
    projection: Projection, name: str, shape: Shape, tp_dim: int | None, *, suffix: str = ".weight"
) -> Parameter:
    """Return the row of something that is added beside a projection; it begins as zero.

    Args:
        projection: What it is beside.
        name: What PEFT calls it.
        shape: Of the whole.
        tp_dim: Dimension that tensor parallelism shards.
        suffix: What PEFT's files have after the name.
    """
    weight = projection.weight
    has_rows = shape[0] == projection.num_rows
    return replace(
        weight,
        name=f"{weight.name.removesuffix('weight')}{projection.name}.{name}",
        core_name=f"{weight.core_name.removesuffix('weight')}adapter.{projection.name}.{name}",
        hugging_face=(f"{projection.hugging_face}.{name}{suffix}",),
        shape=shape,
        init="zeros",
        std=None,
        query_scale=1.0,
        tp_dim=tp_dim,
        arrangement=weight.arrangement if projection.is_fused and has_rows else "plain",
        is_transposed=False,
        is_multiplied=len(shape) == 2,
        repeated_as=(),
    )


def with_uniform_start(row: Parameter, inputs: int) -> Parameter:
    """Return a row that begins with even numbers between ± 1 / sqrt(inputs), as torch's linear layers do."""
    return replace(row, init="uniform", std=1 / math.sqrt(3 * inputs))
