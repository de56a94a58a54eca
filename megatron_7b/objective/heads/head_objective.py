"""The part that objectives of a head share: samples are rows of records, and single tokens go through the head."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_7b.config.distillation_config import DistillationConfig
from megatron_7b.config.schema import RunConfig
from megatron_7b.data.samples.dataset import RecordsOfBatch
from megatron_7b.objective.objective import Sums
from megatron_7b.objective.records import RecordObjective
from megatron_7b.parallel import ParallelLayout

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from megatron_7b.data import Batch


class HeadObjective(RecordObjective):
    """Tells the model which tokens to classify; a subclass says which, and what the loss is.

    Args:
        config: The run.
    """

    def __init__(self, config: RunConfig) -> None:
        self._model = config.model

    def predicted_share(self, config: RunConfig) -> float:  # noqa: ARG002
        """The head is too small to count."""
        return 0.0

    def model_inputs(self, batch: "Batch", device: "torch.device", layout: ParallelLayout) -> dict[str, Any]:
        """Return what the model's forward takes of one microbatch, on the device; `labels` are the head's."""
        import torch

        from megatron_7b.objective.inputs import model_inputs

        assert batch.records is not None
        inputs = model_inputs(batch, device, layout)
        del inputs["loss_mask"]
        arrays = {
            "head_positions": self.positions(batch.records),
            "labels": self.labels(batch.records),
            "tokentype_ids": self.tokentypes(batch.records),
        }
        return inputs | {
            name: torch.from_numpy(array).to(device) for name, array in arrays.items() if array is not None
        }

    def num_losses(self, batch: "Batch") -> int:
        """Return how many texts, words or windows there are: one for each label."""
        assert batch.records is not None
        return len(self.labels(batch.records))

    def states_compared(self, batch: "Batch") -> NDArray[np.bool_]:
        """Return the tokens of records, [b, s]."""
        assert batch.records is not None
        is_text = np.zeros(batch.tokens.size, dtype=bool)
        for begin, length in zip(batch.records.begins, batch.records.lengths, strict=True):
            is_text[begin : begin + length] = True
        return is_text.reshape(batch.tokens.shape)

    def positions(self, records: RecordsOfBatch) -> NDArray[np.int64]:
        """Return the places of the tokens that go through the head, [n]."""
        raise NotImplementedError

    def labels(self, records: RecordsOfBatch) -> NDArray[Any]:
        """Return what the head's outputs are compared with."""
        raise NotImplementedError

    def tokentypes(self, records: RecordsOfBatch) -> NDArray[np.int64] | None:
        """Return which of two texts each token is of, [1, t]; None: there is one text, or the model cannot be told."""
        if self._model.num_tokentypes < 2:
            return None
        return (records.token_values > 0).astype(np.int64).reshape(1, -1)

    def sums(self, output: "Tensor", inputs: Mapping[str, Any]) -> Sums:
        """Return what the head's outputs for one microbatch add up to."""
        raise NotImplementedError

    def distance(
        self,
        output: "Tensor",
        of_teacher: "Tensor",
        inputs: Mapping[str, Any],  # noqa: ARG002 - those of a subclass depend on it
        how: DistillationConfig,
    ) -> "Tensor":
        """Return the sum of the distances of the head's outputs from a teacher's, both FP32 [n, labels].

        Here each row is the logits of one distribution.
        """
        from megatron_7b.model.distillation import distances

        return distances(output, of_teacher, how).sum()


def sums_of(loss: "Tensor", num_records: int, reported: "Sequence[Tensor]") -> Sums:
    """Return sums whose loss, and whatever is reported beside it, is a mean over the same number.

    Args:
        loss: Sum of losses.
        num_records: How many there are.
        reported: A sum each.
    """
    import torch

    count = torch.tensor(num_records, device=loss.device)
    rows = [torch.stack((total.detach().double(), count.double())) for total in (loss, *reported)]
    return Sums(loss, count.to(torch.int), torch.stack(rows))
