"""This rank's microbatches through all pipeline stages."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor


def run_microbatches(
    chunks: Sequence[Any],
    inputs: Sequence[Mapping[str, Any]],
    *,
    seq_length: int,
    micro_batch_size: int,
    forward_only: bool,
) -> Tensor:
    """Run megatron-core's schedule for the layout: forward, and unless `forward_only` backward, of every microbatch.

    Args:
        chunks: This rank's model chunks.
        inputs: Per microbatch what the model's forward takes, on the device; `loss_mask` says which tokens count.
        seq_length: Tokens of a row.
        micro_batch_size: Rows of a microbatch.
        forward_only: Leave the gradients as they are.

    Returns:
        FP64 (sum of token losses, number of tokens) of these microbatches on the last stage, zeros on the others.

    Collective: the tensor-, context- and pipeline-parallel groups; with a backward pass the data-parallel one too.
    """
    iterators = [iter(inputs) for _ in chunks]
    outputs: list[Tensor] = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(inputs),
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )
    device = next(chunks[0].parameters()).device
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
