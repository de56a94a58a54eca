"""Where in a text the answer to a question begins, and where it ends."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_7b.config.distillation_config import DistillationConfig
from megatron_7b.data.labelled.questions import WINDOWS
from megatron_7b.data.samples.dataset import RecordsOfBatch
from megatron_7b.objective.heads.head_objective import HeadObjective, sums_of
from megatron_7b.objective.objective import Sums

if TYPE_CHECKING:
    from torch import Tensor


class QuestionAnswering(HeadObjective):
    """A record is a question with a window of a text; its values are the answer's first and last token in it.

    Both are 0, the first token of the window, if the answer is not in it. Tokens of the text have the value 1. The loss
    of a window is the mean of the cross entropies of both borders, each over all of its tokens.
    """

    kind = WINDOWS
    reported: tuple[str, ...] = ("accuracy",)

    def positions(self, records: RecordsOfBatch) -> NDArray[np.int64]:
        """Return all tokens of all windows, one window after the other, [n]."""
        pieces = [
            np.arange(begin, begin + length) for begin, length in zip(records.begins, records.lengths, strict=True)
        ]
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def labels(self, records: RecordsOfBatch) -> NDArray[Any]:
        """Return the first and last token of each answer, counted within its window, and its length, [windows, 3]."""
        borders = records.values[records.record].astype(np.int64)
        return np.concatenate((borders, records.lengths[:, None]), axis=1)

    def sums(self, output: "Tensor", inputs: Mapping[str, Any]) -> Sums:
        """Return the sum of the losses of windows, and in how many both borders are right; output is [n, 2]."""
        import torch
        from torch.nn import functional

        labels, lengths = inputs["labels"][:, :2], inputs["labels"][:, 2].tolist()
        if not lengths:
            return sums_of(output.sum(), 0, [output.sum()])
        # [windows, longest, 2]; places after the end of a window get no probability.
        lowest = torch.finfo(output.dtype).min
        windows = torch.nn.utils.rnn.pad_sequence(
            list(torch.split(output, lengths)), batch_first=True, padding_value=lowest
        )
        loss = functional.cross_entropy(windows, labels, reduction="sum") / 2
        is_right = (windows.argmax(dim=1) == labels).all(dim=1)
        return sums_of(loss, len(lengths), [is_right.sum()])

    def distance(
        self, output: "Tensor", of_teacher: "Tensor", inputs: Mapping[str, Any], how: DistillationConfig
    ) -> "Tensor":
        """Return the sum over windows, each the mean of both borders': distributions over the window's tokens."""
        import torch

        from megatron_7b.model.distillation import distances

        lengths = inputs["labels"][:, 2].tolist()
        if not lengths:
            return output.sum()
        windows = zip(torch.split(output, lengths), torch.split(of_teacher, lengths), strict=True)
        return torch.stack([distances(own.t(), others.t(), how).mean() for own, others in windows]).sum()
