"""What becomes of the tensors of a model, stage by stage: the part in which kinds of output differ."""

import contextlib
from collections.abc import Iterator
from typing import Protocol

from torch import Tensor, nn

from megatron_7b.compression.quantization.result import LayerError
from megatron_7b.compression.quantization.statistics import InputStatistics
from megatron_7b.conversion.layerwise import LastStage


class Storage(Protocol):
    """Rounds and writes tensors in the order in which a model computes, and leaves in it what readers compute with."""

    kept: list[str]
    """Names of matrices that stay as they were."""

    def first(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Write what is before the layers, and return what readers compute with, under the same names."""

    def linears(self, prefix: str, stage: nn.Module, /) -> dict[str, nn.Linear]:
        """Return the matrices of a stage whose inputs it wants to know, by their names in the stage."""

    def layer(self, prefix: str, layer: nn.Module, statistics: InputStatistics | None) -> list[LayerError]:
        """Round a layer in place, and write it."""

    def last(self, prefix: str, stage: LastStage, statistics: InputStatistics | None) -> list[LayerError]:
        """Round the last norm and the output layer in place, and write them."""

    def computing(self, prefix: str, stage: nn.Module, /) -> contextlib.AbstractContextManager[None]:
        """Let a rounded stage compute as readers do, for the duration of a with block."""

    def finish(self) -> int:
        """Write what is left; return the bytes of all tensors."""


@contextlib.contextmanager
def as_it_is() -> Iterator[None]:
    """Compute with the weights alone."""
    yield
