"""This rank's microbatches through all pipeline stages."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_7b.objective.objective import Objective
from megatron_7b.parallel import ParallelLayout

if TYPE_CHECKING:
    from megatron_7b.data import Batch


def run_microbatches(
    chunks: Sequence[Any],
    batches: "Sequence[Batch]",
    objective: Objective,
    *,
    layout: ParallelLayout,
    device: torch.device,
    forward_only: bool,
) -> Tensor:
    """Run megatron-core's schedule for the layout: forward, and unless `forward_only` backward, of every microbatch.

    Args:
        chunks: This rank's model chunks.
        batches: This rank's microbatches, at least one, all of the same shape.
        objective: Which inputs the model takes of them, and what is made of its output.
        layout: Position of this rank.
        device: Where the chunks are.
        forward_only: Leave the gradients as they are.

    Returns:
        FP64 sums of these microbatches on the last stage, zeros on the others: [1 + reported, 2], a sum of losses and
        the number of tokens that it is over; first of the objective itself, then of what else it reports.

    Collective: the tensor-, context- and pipeline-parallel groups; with a backward pass the data-parallel one too.
    """
    inputs = [objective.model_inputs(batch, device, layout) for batch in batches]
    rows, share = inputs[0]["input_ids"].shape
    iterators = [iter(inputs) for _ in chunks]

    def forward_step(microbatches: Iterator[Mapping[str, Any]], model: Any) -> tuple[Tensor, Any]:
        microbatch = next(microbatches)
        output = model(**microbatch)
        return output, lambda of_last_stage: objective.sums(of_last_stage, microbatch)

    outputs: list[Tensor] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(inputs),
        seq_length=share * layout.cp_size,
        micro_batch_size=rows,
        forward_only=forward_only,
    )
    totals = torch.zeros(1 + len(objective.reported), 2, dtype=torch.float64, device=device)
    for output in outputs:  # empty on all stages but the last
        totals += output
    return totals
