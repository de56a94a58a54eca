"""An objective from outside the package: the token after the next one, and beside it how many labels are even."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_7b.config.objectives import OBJECTIVES
from megatron_7b.objective import BUILDERS
from megatron_7b.objective.causal import CausalLanguageModeling
from megatron_7b.objective.objective import Sums
from megatron_7b.parallel import ParallelLayout

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from megatron_7b.data import Batch


class TwoAhead(CausalLanguageModeling):
    """The labels move by one; the last of each row has none any more."""

    reported = ("even_share",)

    def model_inputs(self, batch: "Batch", device: "torch.device", layout: ParallelLayout) -> dict[str, Any]:
        mask = batch.loss_mask.copy()
        mask[:, -1] = 0
        moved = replace(batch, labels=np.roll(batch.labels, -1, axis=1), loss_mask=mask)
        return super().model_inputs(moved, device, layout)

    def sums(self, output: "Tensor", inputs: Mapping[str, Any]) -> Sums:
        import torch

        sums = super().sums(output, inputs)
        even = ((inputs["labels"] % 2 == 0) * inputs["loss_mask"]).sum()
        own = torch.stack((even.double(), sums.num_tokens.double()))[None]
        return Sums(sums.loss, sums.num_tokens, torch.cat((sums.reported, own)))


def register() -> None:
    OBJECTIVES["two_ahead"], BUILDERS["two_ahead"] = ("decoder", "bigram"), TwoAhead
