"""An objective whose tokens are also compared with what a teacher says of them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_7b.config.distillation_config import DistillationConfig
from megatron_7b.objective.objective import Judging, Sums

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from megatron_7b.data import Batch
    from megatron_7b.model.distillation import TaughtLosses
    from megatron_7b.parallel import ParallelLayout

TASK_LOSS, DISTANCE = "task_loss", "distillation_loss"
"""Under which both parts of the loss are reported, each a mean over the tokens that count."""


class Distillation:
    """What is made of a microbatch that a teacher has seen: the loss of both parts, and each of them.

    Args:
        base: What the model would be trained for without the teacher: the same tokens count, with the same weights.
        how: How it is compared with the teacher.
    """

    def __init__(self, base: Judging, how: DistillationConfig) -> None:
        self._how = how
        self._base = base
        self.reported = (*base.reported, TASK_LOSS, DISTANCE)

    def model_inputs(self, batch: "Batch", device: "torch.device", layout: "ParallelLayout") -> dict[str, Any]:
        """Return what the model's forward takes of one microbatch; what a teacher says now comes beside it."""
        inputs = self._base.model_inputs(batch, device, layout)
        if batch.top_logits is None:
            return inputs
        import torch

        from megatron_7b.model.distillation import TopTaught

        # The student goes through the tokens of its rows position by position.
        rows, length = inputs["input_ids"].shape
        ids, logps = (
            torch.from_numpy(part).to(device).view(rows, length, -1).transpose(0, 1).flatten(0, 1)
            for part in (batch.top_logits.ids.astype("int64"), batch.top_logits.logps.astype("float32"))
        )
        return {**inputs, "taught": TopTaught(ids, logps - logps.logsumexp(1, keepdim=True), self._how)}

    def sums(self, output: "TaughtLosses | Tensor", inputs: Mapping[str, Any]) -> Sums:
        """Return the sum of the losses, and sum and number of each of its parts; without a teacher there is one."""
        import torch

        if isinstance(output, torch.Tensor):
            alone = self._base.sums(output, inputs)
            return Sums(
                alone.loss,
                alone.num_tokens,
                torch.cat((alone.reported, alone.reported[:1], torch.zeros_like(alone.reported[:1]))),
            )
        total = self._base.sums(output.loss, inputs)
        number = total.reported[0, 1]
        parts = torch.stack([torch.stack((part.detach().double(), number)) for part in (output.task, output.distance)])
        return Sums(total.loss, total.num_tokens, torch.cat((total.reported, parts)))
