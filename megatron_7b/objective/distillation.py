"""An objective whose tokens are also compared with what a teacher says of them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_7b.objective.objective import Judging, Sums

if TYPE_CHECKING:
    import torch

    from megatron_7b.data import Batch
    from megatron_7b.model.distillation import TaughtLosses
    from megatron_7b.parallel import ParallelLayout

TASK_LOSS, DISTANCE = "task_loss", "distillation_loss"
"""Under which both parts of the loss are reported, each a mean over the tokens that count."""


class Distillation:
    """What is made of a microbatch that a teacher has seen: the loss of both parts, and each of them.

    Args:
        base: What the model would be trained for without the teacher: the same tokens count, with the same weights.
    """

    def __init__(self, base: Judging) -> None:
        self._base = base
        self.reported = (*base.reported, TASK_LOSS, DISTANCE)

    def model_inputs(self, batch: "Batch", device: "torch.device", layout: "ParallelLayout") -> dict[str, Any]:
        """Return what the model's forward takes of one microbatch; what the teacher says of it comes beside it."""
        return self._base.model_inputs(batch, device, layout)

    def sums(self, output: "TaughtLosses", inputs: Mapping[str, Any]) -> Sums:
        """Return the sum of the losses, and sum and number of each of its parts."""
        import torch

        total = self._base.sums(output.loss, inputs)
        number = total.reported[0, 1]
        parts = torch.stack([torch.stack((part.detach().double(), number)) for part in (output.task, output.distance)])
        return Sums(total.loss, total.num_tokens, torch.cat((total.reported, parts)))
