"""One step: forward and backward over the microbatches of all pipeline stages, then the update."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from numpy.typing import NDArray
from torch import Tensor

from megatron_7b.model.microbatches import run_microbatches
from megatron_7b.parallel import ParallelLayout
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


def model_inputs(batch: "Batch", device: torch.device, layout: ParallelLayout) -> dict[str, Any]:
    """Return what the model's forward takes of one microbatch, on the device.

    Where the batch knows its documents, its rows become a single one of b × s tokens, whose documents megatron-core's
    packed attention keeps apart; positions are counted from each document's beginning.
    """
    names = {"input_ids": "tokens", "labels": "labels", "loss_mask": "loss_mask", "position_ids": "position_ids"}
    inputs: dict[str, Any] = {
        name: torch.from_numpy(getattr(batch, array)).to(device, non_blocking=True) for name, array in names.items()
    }
    if batch.cu_seqlens is None:
        return {name: _context_parallel_share(rows, layout) for name, rows in inputs.items()}
    inputs = {name: rows.reshape(1, -1) for name, rows in inputs.items()}
    return {**inputs, "packed_seq_params": _packed_documents(batch.cu_seqlens, device)}


def _packed_documents(cu_seqlens: NDArray[np.int32], device: torch.device) -> PackedSeqParams:
    cumulative = torch.from_numpy(cu_seqlens).to(device, non_blocking=True)
    longest = int(np.diff(cu_seqlens).max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cumulative,
        cu_seqlens_kv=cumulative,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _context_parallel_share(rows: Tensor, layout: ParallelLayout) -> Tensor:
    """Return this context-parallel rank's positions of [b, s]: one early and one late piece, [b, s/cp].

    Source: Transformer Engine's causal load balance: of 2 × cp pieces, rank r holds piece r and piece 2 × cp - 1 - r.
    """
    if layout.cp_size == 1:
        return rows
    pieces = rows.chunk(2 * layout.cp_size, dim=1)
    return torch.cat((pieces[layout.cp_rank], pieces[-1 - layout.cp_rank]), dim=1)


def _run_schedule(trainer: "Core", batches: "Sequence[Batch]", *, forward_only: bool) -> tuple[float, int]:
    """Run all microbatches through all stages; return the sum of token losses and the number of tokens.

    Collective: all ranks.
    """
    inputs = [model_inputs(batch, trainer.device, trainer.layout) for batch in batches]
    seq_length, micro_batch_size = trainer.config.data.seq_length, trainer.config.training.micro_batch_size
    if trainer.config.data.reset_attention_mask:
        seq_length, micro_batch_size = seq_length * micro_batch_size, 1  # what `model_inputs` makes of such batches
    totals = run_microbatches(
        trainer.model, inputs, seq_length=seq_length, micro_batch_size=micro_batch_size, forward_only=forward_only
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
