"""The parameters of low-rank updates, under the names that PEFT gives them. Imports no torch.

Source: Hu et al. 2021 (LoRA), Kalajdzievski 2023 (rsLoRA), Liu et al. 2024 (DoRA); initial values as PEFT draws them.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

from megatron_7b.adapter.rows import own_row, with_uniform_start
from megatron_7b.adapter.targets import Projection
from megatron_7b.config.adapters import AdapterConfig
from megatron_7b.model.parameters import Parameter

DOWN, UP, MAGNITUDE, VALUES = "lora_A", "lora_B", "lora_magnitude_vector", "lora_E"


def scale_of(adapter: AdapterConfig) -> float:
    """Return what updates are multiplied by.

    AdaLoRA's is that of the initial rank, however many are left, and PEFT adds 1e-5 to it.
    """
    if adapter.method == "adalora":
        return adapter.alpha / (adapter.initial_rank + 1e-5)
    return adapter.alpha / (math.sqrt(adapter.rank) if adapter.use_rslora else adapter.rank)


def low_rank_rows(projection: Projection, adapter: AdapterConfig) -> Iterator[Parameter]:
    """Yield the rows of the update of one projection.

    A is [r, in] and B is [out, r]. Tensor parallelism shards what it shards of the weight: A where that is sharded
    along its inputs, B and the magnitudes along its outputs. AdaLoRA's values between them are [r, 1].
    """
    weight = projection.weight
    outputs, inputs = projection.num_rows, weight.shape[1]
    is_column = weight.tp_dim == 0
    if adapter.method == "adalora":
        rank = adapter.initial_rank
        down = own_row(projection, DOWN, (rank, inputs), None if is_column else weight.tp_dim, suffix="")
        yield replace(down, init="normal", std=0.02)
        up = own_row(projection, UP, (outputs, rank), 0 if is_column else None, suffix="")
        yield replace(up, init="normal", std=0.02)
        yield own_row(projection, VALUES, (rank, 1), None, suffix="")
        return
    rank = adapter.rank
    yield with_uniform_start(own_row(projection, DOWN, (rank, inputs), None if is_column else weight.tp_dim), inputs)
    yield own_row(projection, UP, (outputs, rank), 0 if is_column else None)
    if adapter.method == "dora":
        yield own_row(projection, MAGNITUDE, (outputs,), 0 if is_column else None, suffix="")
