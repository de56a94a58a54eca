"""What CUDA's generators do for graph-safe random states, on a CPU.

On CUDA, the state that a generator draws from is an object of its own: `graphsafe_set_state` exchanges it, and
`graphsafe_get_state` hands out a reference, in which every later draw shows. torch's generator of a CPU has no such
states, so here a `GeneratorState` is either in use, and speaks for the CPU's generator, or keeps its own bits.

Source: what megatron-core's `CudaRNGStatesTracker(use_cudagraphable_rng=True)` and `convert_cuda_rng_state` ask for.
"""

from typing import override

import torch
from torch import Tensor


class GeneratorState(torch.Generator):
    """A random state that can be exchanged; to megatron-core a generator, as on CUDA."""

    @override
    def get_state(self) -> Tensor:
        return torch.default_generator.get_state() if self is _in_use[0] else super().get_state()

    @override
    def set_state(self, new_state: Tensor) -> "GeneratorState":
        if self is _in_use[0]:
            torch.default_generator.set_state(new_state)
        super().set_state(new_state)
        return self

    @override
    def manual_seed(self, seed: int) -> "GeneratorState":
        super().manual_seed(seed)
        return self.set_state(super().get_state())

    @override
    def clone_state(self) -> "GeneratorState":
        return GeneratorState().set_state(self.get_state())


_in_use: list[torch.Generator | None] = [None]


def graph_safe_state() -> torch.Generator:
    """Return the state in use; what is drawn from now on shows in it."""
    state = _in_use[0] or GeneratorState()
    _in_use[0] = state
    return state


def use_graph_safe_state(state: torch.Generator) -> None:
    """Draw from this state from now on; the one in use until now keeps what it has come to."""
    former, bits = graph_safe_state(), torch.default_generator.get_state()
    if state is former:
        return
    _in_use[0] = state
    torch.Generator.set_state(former, bits)
    torch.default_generator.set_state(torch.Generator.get_state(state))


class DefaultGenerator(torch.Generator):
    """Stands for the default generator of a CUDA device: the CPU's, with states that can be exchanged."""

    @override
    def get_state(self) -> Tensor:
        return torch.default_generator.get_state()

    @override
    def set_state(self, new_state: Tensor) -> "DefaultGenerator":
        torch.default_generator.set_state(new_state)
        return self

    @override
    def manual_seed(self, seed: int) -> "DefaultGenerator":
        torch.default_generator.manual_seed(seed)
        return self

    @override
    def clone_state(self) -> GeneratorState:
        return GeneratorState().set_state(self.get_state())

    @override
    def graphsafe_get_state(self) -> torch.Generator:
        return graph_safe_state()

    @override
    def graphsafe_set_state(self, state: torch.Generator) -> "DefaultGenerator":
        use_graph_safe_state(state)
        return self
