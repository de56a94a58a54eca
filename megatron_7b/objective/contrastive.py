"""Vectors of queries that are near those of the texts that answer them, and far from all others (InfoNCE)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_7b.config.schema import RunConfig
from megatron_7b.data.embeddings.encoding import NAME
from megatron_7b.objective.objective import ASIDE, Sums
from megatron_7b.objective.records import RecordObjective
from megatron_7b.parallel import ParallelLayout

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from megatron_7b.data import Batch


@dataclass(frozen=True)
class _Roles:
    """Which texts of a microbatch are what.

    Attributes:
        queries: [n], where the queries are among the texts.
        candidates: [m], where all other texts are.
        own: [n], which of the candidates belongs to each query.
    """

    queries: "Tensor"
    candidates: "Tensor"
    own: "Tensor"


class EmbeddingTraining(RecordObjective):
    """Samples are rows of queries with their texts; the loss is the mean over the queries.

    Every query is compared with the positives and negatives of all queries of its microbatch.
    """

    kind = NAME

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.reported = ("accuracy",)
        self._options = config.finetune

    def predicted_share(self, config: RunConfig) -> float:  # noqa: ARG002
        """Nothing passes the output layer."""
        return 0.0

    def model_inputs(self, batch: "Batch", device: "torch.device", layout: ParallelLayout) -> dict[str, Any]:
        """Return what the model's forward takes of one microbatch, on the device."""
        import torch

        from megatron_7b.model.pooling import Pooling

        inputs = super().model_inputs(batch, device, layout)
        if batch.records is None:  # a text whose tokens shall be predicted
            return inputs
        del inputs["labels"], inputs["loss_mask"]
        records = batch.records
        parts = list(zip(records.begins.tolist(), (records.begins + records.lengths).tolist(), strict=True))
        is_query = np.diff(records.record, prepend=-1) != 0
        place = np.cumsum(~is_query) - 1  # of each candidate; a query has that of the one before
        roles = (np.flatnonzero(is_query), np.flatnonzero(~is_query), place[is_query] + 1)
        aside = _Roles(*(torch.from_numpy(numbers).to(device) for numbers in roles))
        return {**inputs, "pooling": Pooling(self._options.pooling, parts), ASIDE: aside}

    def sums(self, output: "Tensor", inputs: Mapping[str, Any]) -> Sums:
        """Return the sum of the losses of the queries, their number, and how many find their own text first."""
        import torch

        roles: _Roles = inputs[ASIDE]
        losses, hits = self._compare(output, roles)
        count = torch.tensor(len(roles.queries), device=output.device)
        reported = torch.stack([torch.stack((total.detach().double(), count.double())) for total in (losses, hits)])
        return Sums(losses, count.to(torch.int), reported)

    def _compare(self, vectors: "Tensor", roles: _Roles) -> "tuple[Tensor, Tensor]":
        """Return the sum of the losses over all widths, and the number of hits at the last of them."""
        import torch
        from torch.nn import functional

        losses = vectors.sum() * 0  # of a microbatch without queries
        hits = torch.zeros((), device=vectors.device)
        for width in self._options.matryoshka_dims or (vectors.shape[1],):
            unit = functional.normalize(vectors[:, :width], dim=1)
            scores = unit[roles.queries] @ unit[roles.candidates].t() / self._options.temperature
            if len(roles.queries):
                losses = losses + functional.cross_entropy(scores, roles.own, reduction="sum")
                hits = (scores.argmax(dim=1) == roles.own).sum()
        return losses, hits


class TextVectors(EmbeddingTraining):
    """Texts by themselves, to make vectors of them."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.reported = ()

    def sums(self, output: "Tensor", inputs: Mapping[str, Any]) -> Sums:  # noqa: ARG002
        """Report the vectors, of length 1, [texts, h]."""
        from torch.nn import functional

        nothing = output.new_zeros(())
        return Sums(nothing, nothing.int(), functional.normalize(output, dim=1))
