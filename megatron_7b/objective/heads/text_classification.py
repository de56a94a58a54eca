"""The class of a text or of a pair of texts, several classes, or a number."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_7b.config.distillation_config import DistillationConfig
from megatron_7b.config.schema import RunConfig
from megatron_7b.data.labelled.texts import NAME
from megatron_7b.data.samples.dataset import RecordsOfBatch
from megatron_7b.objective.heads.head_objective import HeadObjective, sums_of
from megatron_7b.objective.objective import Sums

if TYPE_CHECKING:
    from torch import Tensor

_REPORTED = {
    "single_label_classification": "accuracy",
    "multi_label_classification": "label_accuracy",
    "regression": "absolute_error",
}


class TextClassification(HeadObjective):
    """A record has one sequence; its values are the number of its class, a 0 or 1 for each class, or what is predicted.

    The loss is the mean over the texts: the cross entropy; the mean over the classes of the binary one; or the mean
    squared error. An encoder classifies by a text's first token, a decoder by its last.
    """

    kind = NAME

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.reported = (_REPORTED[config.model.problem_type],)

    def positions(self, records: RecordsOfBatch) -> NDArray[np.int64]:
        """Return the first token of each text, or for a decoder the last, [n]."""
        return records.begins if self._model.traits.kind == "encoder" else records.begins + records.lengths - 1

    def labels(self, records: RecordsOfBatch) -> NDArray[Any]:
        """Return the class of each text, int64 [n]; or a number for each output, [n, labels]."""
        values = records.values[records.record]
        return values[:, 0].astype(np.int64) if self._model.problem_type == "single_label_classification" else values

    def sums(self, output: "Tensor", inputs: Mapping[str, Any]) -> Sums:
        """Return the sum of the losses of texts and of what is reported of them; output is [n, labels]."""
        from torch.nn import functional

        labels = inputs["labels"]
        match self._model.problem_type:
            case "single_label_classification":
                loss = functional.cross_entropy(output, labels, reduction="sum")
                right = (output.argmax(dim=1) == labels).sum()
            case "multi_label_classification":
                loss = functional.binary_cross_entropy_with_logits(output, labels, reduction="none").mean(dim=1).sum()
                right = ((output > 0) == (labels > 0.5)).double().mean(dim=1).sum()
            case "regression":
                loss = functional.mse_loss(output, labels, reduction="none").mean(dim=1).sum()
                right = (output - labels).abs().mean(dim=1).sum()
        return sums_of(loss, len(output), [right])

    def distance(
        self, output: "Tensor", of_teacher: "Tensor", inputs: Mapping[str, Any], how: DistillationConfig
    ) -> "Tensor":
        """Return the sum over the texts; of several classes or numbers the mean over them, as the loss has it.

        Where several classes may be right, each of them and its absence are a distribution of two; numbers are compared
        by their squared difference.
        """
        import torch
        from torch.nn import functional

        from megatron_7b.model.distillation import distances

        match self._model.problem_type:
            case "multi_label_classification":
                own, others = (torch.stack((x, torch.zeros_like(x)), dim=2) for x in (output, of_teacher))
                return distances(own, others, how).mean(dim=1).sum()
            case "regression":
                return functional.mse_loss(output, of_teacher, reduction="none").mean(dim=1).sum()
        return super().distance(output, of_teacher, inputs, how)
