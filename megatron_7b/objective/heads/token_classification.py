"""The class of each word of a text, such as names of people and places."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_7b.data.labelled.tags import NAME
from megatron_7b.data.samples.dataset import RecordsOfBatch
from megatron_7b.objective.heads.head_objective import HeadObjective, sums_of
from megatron_7b.objective.objective import Sums

if TYPE_CHECKING:
    from torch import Tensor


class TokenClassification(HeadObjective):
    """A record has one sequence; the value of a word's first token is the number of its class, counted from 1.

    Tokens of value 0 only give context. The loss is the mean cross entropy of the words.
    """

    kind = NAME
    reported: tuple[str, ...] = ("accuracy",)

    def positions(self, records: RecordsOfBatch) -> NDArray[np.int64]:
        """Return the first token of each word, [n]."""
        return np.flatnonzero(records.token_values)

    def labels(self, records: RecordsOfBatch) -> NDArray[Any]:
        """Return the class of each word, int64 [n]."""
        classes: NDArray[np.int64] = records.token_values[records.token_values != 0].astype(np.int64) - 1
        return classes

    def tokentypes(self, records: RecordsOfBatch) -> None:  # noqa: ARG002
        """There is one text."""
        return

    def sums(self, output: "Tensor", inputs: Mapping[str, Any]) -> Sums:
        """Return the sum of the losses of words and how many are right; output is [n, labels]."""
        from torch.nn import functional

        labels = inputs["labels"]
        loss = functional.cross_entropy(output, labels, reduction="sum")
        return sums_of(loss, len(output), [(output.argmax(dim=1) == labels).sum()])
