"""An objective whose predictions are also compared with a teacher's, of the same tokens, texts or words."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_7b.config.distillation_config import DistillationConfig
from megatron_7b.objective.heads.head_objective import HeadObjective
from megatron_7b.objective.objective import ASIDE, Judging, Sums

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from megatron_7b.data import Batch
    from megatron_7b.model.distillation import TaughtLosses
    from megatron_7b.model.kinds.encoder.network import EncoderOutput
    from megatron_7b.parallel import ParallelLayout

TASK_LOSS, DISTANCE = "task_loss", "distillation_loss"
"""Under which both parts of the loss are reported, each a mean over what counts: tokens, texts, words or windows."""


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

    def sums(self, output: "TaughtLosses | EncoderOutput | Tensor", inputs: Mapping[str, Any]) -> Sums:
        """Return the sum of the losses, and sum and number of each of its parts; without a teacher there is one.

        What the task adds to the losses of tokens, such as that of pairs of sentences, no teacher judges: it is added
        whole.
        """
        import torch

        from megatron_7b.model.distillation import TaughtLosses

        if isinstance(output, torch.Tensor):
            task = self._base.sums(output, inputs)
            if not isinstance(self._base, HeadObjective) or ASIDE not in inputs:
                nothing = torch.zeros_like(task.reported[:1])
                return Sums(task.loss, task.num_tokens, torch.cat((task.reported, task.reported[:1], nothing)))
            distance = self._base.distance(output, inputs[ASIDE], inputs, self._how)
            loss = (1 - self._how.alpha) * task.loss + self._how.alpha * distance
        else:
            taught = output if isinstance(output, TaughtLosses) else output.taught
            assert taught is not None
            task = self._base.sums(taught.task if taught is output else output, inputs)
            loss, distance = taught.loss + (task.loss - taught.task), taught.distance
        number = task.reported[0, 1]
        mean, apart = (torch.stack((part.detach().double(), number))[None] for part in (loss, distance))
        return Sums(loss, task.num_tokens, torch.cat((mean, task.reported[1:], task.reported[:1], apart)))
