"""This rank's microbatches through all pipeline stages."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from numpy.typing import NDArray
from torch import Tensor

from megatron_7b.parallel import ParallelLayout

if TYPE_CHECKING:
    from megatron_7b.data import Batch


def run_microbatches(
    chunks: Sequence[Any],
    batches: "Sequence[Batch]",
    *,
    layout: ParallelLayout,
    device: torch.device,
    forward_only: bool,
) -> Tensor:
    """Run megatron-core's schedule for the layout: forward, and unless `forward_only` backward, of every microbatch.

    Args:
        chunks: This rank's model chunks.
        batches: This rank's microbatches, at least one, all of the same shape; `loss_mask` says which tokens count.
        layout: Position of this rank.
        device: Where the chunks are.
        forward_only: Leave the gradients as they are.

    Returns:
        FP64 (sum of token losses, number of tokens) of these microbatches on the last stage, zeros on the others.

    Collective: the tensor-, context- and pipeline-parallel groups; with a backward pass the data-parallel one too.
    """
    inputs = [model_inputs(batch, device, layout) for batch in batches]
    rows, share = inputs[0]["input_ids"].shape
    iterators = [iter(inputs) for _ in chunks]
    outputs: list[Tensor] = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(inputs),
        seq_length=share * layout.cp_size,
        micro_batch_size=rows,
        forward_only=forward_only,
    )
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for output in outputs:  # empty on all stages but the last
        totals += output
    return totals


def _forward_step(inputs: Iterator[Mapping[str, Any]], model: Any) -> tuple[Tensor, Any]:
    microbatch = next(inputs)
    output = model(**microbatch)

    def count_tokens(loss_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        num_tokens = microbatch["loss_mask"].sum()
        # megatron-core scales the first of the three in place; what is reported must be its own copy.
        return loss_sum, num_tokens.to(torch.int), torch.stack((loss_sum.detach().double(), num_tokens.double()))

    return output, count_tokens


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
