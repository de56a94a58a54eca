"""Objectives whose loss is a weighted sum of the losses of single tokens, which the model itself computes.

Imports torch only where a microbatch is at hand: what a run reads is looked at without it.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_7b.config.schema import RunConfig
from megatron_7b.objective.objective import Sums
from megatron_7b.parallel import ParallelLayout

if TYPE_CHECKING:
    import torch

    from megatron_7b.data import Batch


class TokenLosses:
    """The part that such objectives share: inputs of the model, and sums over the tokens that count."""

    reported: tuple[str, ...] = ()

    def __init__(self, config: RunConfig) -> None:
        """Prepare for a run; what follows from its configuration is the same on all ranks."""

    def window_length(self, config: RunConfig) -> int:
        """A sample is made of as many tokens of text as it has."""
        return config.data.seq_length

    def predicted_share(self, config: RunConfig) -> float:  # noqa: ARG002
        """All tokens are predicted."""
        return 1.0

    def model_inputs(self, batch: "Batch", device: "torch.device", layout: ParallelLayout) -> dict[str, Any]:
        """Return what the model's forward takes of one microbatch, on the device."""
        from megatron_7b.objective.inputs import model_inputs

        return model_inputs(batch, device, layout)

    def num_losses(self, batch: "Batch") -> int:
        """Return the number of tokens that count, by their weights."""
        return int(batch.loss_mask.sum())

    def states_compared(self, batch: "Batch") -> NDArray[np.bool_]:
        """Return the tokens whose prediction counts, [b, s]."""
        counts: NDArray[np.bool_] = batch.loss_mask != 0
        return counts

    def sums(self, output: Any, inputs: Mapping[str, Any]) -> Sums:
        """Return the sum of losses, the number of tokens that it is over, and both as they are reported."""
        import torch

        num_tokens = inputs["loss_mask"].sum()
        # megatron-core scales the first of the three in place; what is reported must be its own copy.
        reported = torch.stack((output.detach().double(), num_tokens.double()))[None]
        return Sums(output, num_tokens.to(torch.int), reported)
