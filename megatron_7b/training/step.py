"""One step: forward and backward over the microbatches of all pipeline stages, then the update."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megatron_7b.model.microbatches import run_microbatches
from megatron_7b.parallel.groups import broadcast_from_last_stage, sum_over_replicas

if TYPE_CHECKING:
    from megatron_7b.data import Batch
    from megatron_7b.training.assemble import Core


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step did; the same on all ranks.

    Attributes:
        loss: Mean over all tokens of the global batch that the loss mask keeps, before the update [nats per token].
        grad_norm: Global L2 norm of the gradients before clipping.
        num_tokens: Tokens in that mean.
        skipped: Loss or gradients were not finite: parameters and optimizer state are as before.
    """

    loss: float
    grad_norm: float
    num_tokens: int
    skipped: bool


def _run_schedule(trainer: "Core", batches: "Sequence[Batch]", *, forward_only: bool) -> tuple[float, int]:
    """Run all microbatches through all stages; return the sum of token losses and the number of tokens.

    Collective: all ranks.
    """
    totals = run_microbatches(
        trainer.model, batches, layout=trainer.layout, device=trainer.device, forward_only=forward_only
    )
    loss_sum, num_tokens = broadcast_from_last_stage(sum_over_replicas(totals)).tolist()
    return loss_sum, int(num_tokens)


def train_step(trainer: "Core", batches: "Sequence[Batch]", learning_rate: float) -> StepResult:
    """Do one update from this rank's microbatches of the global batch.

    Args:
        trainer: What `assemble` built.
        batches: This rank's microbatches, all of `micro_batch_size` sequences.
        learning_rate: For this update.

    Collective: all ranks.
    """
    for chunk in trainer.model:
        chunk.train()
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    loss_sum, num_tokens = _run_schedule(trainer, batches, forward_only=False)
    outcome = trainer.optimizer.step(learning_rate)
    return StepResult(
        loss=loss_sum / max(1, num_tokens), grad_norm=outcome.grad_norm, num_tokens=num_tokens, skipped=outcome.skipped
    )


@torch.no_grad()
def evaluate_step(trainer: "Core", batches: "Sequence[Batch]") -> tuple[float, int]:
    """Return the sum of token losses of a global batch, and its number of tokens, without an update.

    Collective: all ranks.
    """
    for chunk in trainer.model:
        chunk.eval()
    return _run_schedule(trainer, batches, forward_only=True)
