"""The assistant's words in conversations, from all before them (supervised fine-tuning)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_7b.data.conversations.reading import NAME
from megatron_7b.objective.objective import Sums
from megatron_7b.objective.records import RecordObjective

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_7b.data import Batch


class ConversationTraining(RecordObjective):
    """Samples are rows of whole conversations; the loss is the mean over the tokens that count.

    A token's weight scales its loss, not the number that the sum is divided by.
    """

    kind = NAME

    def num_losses(self, batch: "Batch") -> int:
        """Return the number of tokens that count, whatever their weights."""
        return int((batch.loss_mask != 0).sum())

    def sums(self, output: "Tensor", inputs: Mapping[str, Any]) -> Sums:
        """Return the weighted sum of losses and the number of tokens that count."""
        return super().sums(output, {**inputs, "loss_mask": inputs["loss_mask"] != 0})
