"""The parameters of bottleneck adapters. Imports no torch.

Source: Houlsby et al. 2019, after attention and MLP; Pfeiffer et al. 2021, after the MLP alone. They begin as nothing:
the up-projection is zero.
"""

from collections.abc import Iterator

from megatron_7b.adapter.rows import own_row, with_uniform_start
from megatron_7b.adapter.targets import Projection
from megatron_7b.model.parameters import Parameter

DOWN, UP = "bottleneck_down", "bottleneck_up"


def bottleneck_rows(projection: Projection, size: int) -> Iterator[Parameter]:
    """Yield the rows of the MLP after one linear layer, which every tensor rank holds whole."""
    width = projection.weight.shape[0]
    yield with_uniform_start(own_row(projection, f"{DOWN}.weight", (size, width), None, suffix=""), width)
    yield own_row(projection, f"{DOWN}.bias", (size,), None, suffix="")
    yield own_row(projection, f"{UP}.weight", (width, size), None, suffix="")
    yield own_row(projection, f"{UP}.bias", (width,), None, suffix="")
