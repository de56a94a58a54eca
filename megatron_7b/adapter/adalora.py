"""AdaLoRA's schedule: how many ranks all updates of a model have together after a step. Imports no torch.

Source: Zhang et al. 2023, in the form of PEFT 0.21 (`RankAllocator`): P Λ Q with singular values that are switched off.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_7b.config.adapters import AdapterConfig


@dataclass(frozen=True, kw_only=True)
class RankBudget:
    """The number of ranks as a function of the step.

    Attributes:
        adapter: The section of the configuration.
        num_updates: Low-rank updates of the whole model, on all pipeline stages.
        total_steps: Steps of the run.
    """

    adapter: AdapterConfig
    num_updates: int
    total_steps: int

    @property
    def initial(self) -> int:
        """Ranks at first."""
        return self.adapter.initial_rank * self.num_updates

    @property
    def _target(self) -> int:
        return self.adapter.target_rank * self.num_updates

    @property
    def _last(self) -> int:
        """The step after which it is decided for good which ranks are left."""
        return self.total_steps - self.adapter.tfinal

    def phase(self, step: int) -> Literal["choosing", "chosen", "fixed"]:
        """Return whether importance is still measured, is judged for the last time, or no longer matters.

        Args:
            step: Number of updates that the optimizer has done.
        """
        return "choosing" if step < self._last else "chosen" if step == self._last else "fixed"

    def after(self, step: int) -> int | None:
        """Return how many ranks are left after a step; None if they are not chosen anew after it."""
        adapter = self.adapter
        if step == self._last:
            return self._target
        if step <= adapter.tinit or step > self._last or step % adapter.delta_t:
            return None
        left = 1 - (step - adapter.tinit) / (self._last - adapter.tinit)
        return int((self.initial - self._target) * left**3 + self._target)
