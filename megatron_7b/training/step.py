"""One step: forward and backward over the microbatches of all pipeline stages, then the update."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from megatron_7b.objective.microbatches import run_microbatches
from megatron_7b.parallel.groups import sum_over_replicas, sum_over_stages
from megatron_7b.training.balance import take_balance
from megatron_7b.training.norms import Norms, NormsBy, measure_norms

if TYPE_CHECKING:
    from megatron_7b.data import Batch
    from megatron_7b.training.learner import Learner


@dataclass(frozen=True)
class Losses:
    """Sums over a global batch; the same on all ranks.

    Attributes:
        loss_sum: Of the losses of all tokens that count [nats].
        num_tokens: How many they are.
        further: What else the objective reports, by name: sum and number.
    """

    loss_sum: float
    num_tokens: int
    further: Mapping[str, tuple[float, float]]

    @property
    def loss(self) -> float:
        """Mean per token [nats]."""
        return self.loss_sum / max(1, self.num_tokens)

    @property
    def extra(self) -> dict[str, float]:
        """Further means by name; NaN where there was nothing to average."""
        return {name: total / number if number else math.nan for name, (total, number) in self.further.items()}

    def plus(self, other: "Losses | None") -> "Losses":
        """Return those of both global batches."""
        if other is None:
            return self
        further = {}
        for name, (total, number) in self.further.items():
            further[name] = total + other.further[name][0], number + other.further[name][1]
        return Losses(self.loss_sum + other.loss_sum, self.num_tokens + other.num_tokens, further)


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step did; the same on all ranks.

    Attributes:
        losses: Over the global batch, before the update.
        grad_norm: Global L2 norm of the gradients before clipping.
        skipped: Loss or gradients were not finite: parameters and optimizer state are as before.
        norms: Of gradients and parameters by group, if they were asked for.
    """

    losses: Losses
    grad_norm: float
    skipped: bool
    norms: Norms | None = None

    @property
    def loss(self) -> float:
        """Mean over all tokens of the global batch that count, before the update [nats per token]."""
        return self.losses.loss


def _run_schedule(learner: "Learner", batches: "Sequence[Batch]", *, forward_only: bool) -> Losses:
    """Run all microbatches through all stages. Collective: all ranks."""
    objective, taught = learner.judging, None
    if learner.teacher is not None:
        with learner.clock.part("teacher"):
            taught = learner.teacher.answers(batches, learner.objective, learner.clock)
    totals = run_microbatches(
        learner.model,
        batches,
        objective,
        layout=learner.layout,
        device=learner.device,
        forward_only=forward_only,
        beside=taught,
    )
    with learner.clock.part("communication"):
        (loss_sum, num_tokens), *rows = sum_over_stages(sum_over_replicas(totals)).tolist()
    further = {name: (total, number) for name, (total, number) in zip(objective.reported, rows, strict=True)}
    if learner.teacher is not None and learner.teacher.matching is not None:
        with learner.clock.part("communication"):
            terms = learner.teacher.matching.terms()
        for name, (weight, total, number) in terms.items():
            loss_sum += num_tokens * weight * total / max(1.0, number)
            further[name] = total, number
    return Losses(loss_sum, int(num_tokens), further)


def train_step(
    learner: "Learner", batches: "Sequence[Batch]", learning_rate: float, norms_by: NormsBy = "none"
) -> StepResult:
    """Do one update from this rank's microbatches of the global batch.

    Args:
        learner: What `build_learner` built.
        batches: This rank's microbatches, all of `micro_batch_size` sequences.
        learning_rate: For this update.
        norms_by: Measure norms of these.

    Collective: all ranks.
    """
    clock = learner.clock
    with clock.part("optimizer"):
        for chunk in learner.model:
            chunk.train()
            chunk.zero_grad_buffer()
        learner.optimizer.zero_grad()
    losses = _run_schedule(learner, batches, forward_only=False)
    losses = replace(losses, further={**losses.further, **take_balance(learner.config.model, len(batches))})
    norms = None if norms_by == "none" else measure_norms(learner, by_layer=norms_by == "layers")
    with clock.part("optimizer"):
        outcome = learner.optimizer.step(learning_rate)
    return StepResult(losses=losses, grad_norm=outcome.grad_norm, skipped=outcome.skipped, norms=norms)


@torch.no_grad()
def evaluate_step(learner: "Learner", batches: "Sequence[Batch]") -> Losses:
    """Return the losses of a global batch, without an update.

    Collective: all ranks.
    """
    for chunk in learner.model:
        chunk.eval()
    return _run_schedule(learner, batches, forward_only=True)
