"""This rank's microbatches through all pipeline stages."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from numpy.typing import NDArray
from torch import Tensor

from megatron_7b.objective.objective import ASIDE, Judging
from megatron_7b.parallel import ParallelLayout

if TYPE_CHECKING:
    from megatron_7b.data import Batch

_MICROBATCHES_PER_STAGE = 4
"""Microbatches of a round of p stages, in multiples of p: filling the pipeline takes (p-1) / (4p + p-1) of the time."""


def run_microbatches(
    chunks: Sequence[Any],
    batches: "Sequence[Batch]",
    objective: Judging,
    *,
    layout: ParallelLayout,
    device: torch.device,
    forward_only: bool,
    beside: Sequence[Mapping[str, Any]] | None = None,
) -> Tensor:
    """Run megatron-core's schedule for the layout: forward, and unless `forward_only` backward, of every microbatch.

    Args:
        chunks: This rank's model chunks.
        batches: This rank's microbatches, at least one, all of the same shape.
        objective: Which inputs the model takes of them, and what is made of its output.
        layout: Position of this rank.
        device: Where the chunks are.
        forward_only: Leave the gradients as they are.
        beside: Further inputs of the model, for each microbatch.

    Returns:
        FP64 sums of these microbatches on the last stage, zeros on the others: [1 + reported, 2], a sum of losses and
        the number of tokens that it is over; first of the objective itself, then of what else it reports.

    Collective: the tensor-, context- and pipeline-parallel groups; with a backward pass the data-parallel one too.
    """
    totals = torch.zeros(1 + len(objective.reported), 2, dtype=torch.float64, device=device)
    for reported in run_schedule(
        chunks, batches, objective, layout=layout, device=device, forward_only=forward_only, beside=beside
    ):
        totals += reported
    return totals


def run_schedule(
    chunks: Sequence[Any],
    batches: "Sequence[Batch]",
    objective: Judging,
    *,
    layout: ParallelLayout,
    device: torch.device,
    forward_only: bool,
    beside: Sequence[Mapping[str, Any]] | None = None,
) -> list[Tensor]:
    """Do the same, and return what the objective reports of each microbatch: on the last stage; nothing on the others.

    Collective: as `run_microbatches`.
    """

    def judge(microbatch: Mapping[str, Any]) -> Callable[[Any], Any]:
        return lambda output: objective.sums(output, microbatch)

    return _through_all_stages(
        chunks, batches, objective, judge, layout=layout, device=device, beside=beside, forward_only=forward_only
    )


def rounds_in_order(
    layout: ParallelLayout, micro_batch_size: int, num_samples: int
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Go through samples once, in rounds of as many microbatches as keep all stages busy.

    Args:
        layout: Position of this rank.
        micro_batch_size: Samples of a microbatch.
        num_samples: How many samples there are.

    Yields:
        The sample with which a round ends, and this rank's samples of it, [microbatches, b]. The last round may reach
        beyond the last sample: all ranks do the same number of equal microbatches, as schedules need it.
    """
    if not num_samples:
        return
    num_microbatches = 1 if layout.pp_size == 1 else _MICROBATCHES_PER_STAGE * layout.pp_size
    # Few samples take no more microbatches than they fill; interleaving wants multiples of the number of stages.
    filled = -(-num_samples // (micro_batch_size * layout.dp_size))
    num_microbatches = min(num_microbatches, -(-filled // layout.pp_size) * layout.pp_size)
    shape = (num_microbatches, layout.dp_size, micro_batch_size)
    size = math.prod(shape)
    for first in range(0, num_samples, size):
        samples = np.arange(first, first + size, dtype=np.int64).reshape(shape)
        yield first + size, samples[:, layout.dp_rank]


def run_outputs(
    chunks: Sequence[Any],
    batches: "Sequence[Batch]",
    objective: Judging,
    *,
    layout: ParallelLayout,
    device: torch.device,
    beside: Sequence[Mapping[str, Any]] | None = None,
) -> list[Tensor]:
    """Return what the model itself makes of every microbatch, without a loss; the arguments are those above.

    Returns:
        On the last stage an output per microbatch; on the others nothing.

    Collective: the tensor-, context- and pipeline-parallel groups.
    """
    return _through_all_stages(
        chunks,
        batches,
        objective,
        lambda _: _unchanged,
        layout=layout,
        device=device,
        beside=beside,
        forward_only=True,
        collect_non_loss_data=True,
    )


def _through_all_stages(
    chunks: Sequence[Any],
    batches: "Sequence[Batch]",
    objective: Judging,
    judge: Callable[[Mapping[str, Any]], Callable[..., Any]],
    *,
    layout: ParallelLayout,
    device: torch.device,
    beside: Sequence[Mapping[str, Any]] | None,
    **options: bool,
) -> list[Tensor]:
    """Run megatron-core's schedule; returns what `judge(inputs)` makes of each microbatch's output, on the last stage.

    Args:
        chunks: This rank's model chunks.
        batches: This rank's microbatches.
        objective: Which inputs the model takes of them.
        judge: Returns what is made of the output, given the inputs.
        layout: Position of this rank.
        device: Where the chunks are.
        beside: Further inputs of the model, for each microbatch.
        options: Of the schedule.

    Collective: as `run_microbatches`.
    """
    clock = chunks[0].config.timers
    with clock.part("data") if clock is not None else contextlib.nullcontext():
        inputs = [objective.model_inputs(batch, device, layout) for batch in batches]
    if beside is not None:
        inputs = [{**own, **further} for own, further in zip(inputs, beside, strict=True)]
    rows, share = inputs[0]["input_ids"].shape
    iterators = [iter(inputs) for _ in chunks]

    def forward_step(microbatches: Iterator[Mapping[str, Any]], model: Any) -> tuple[Tensor, Any]:
        microbatch = next(microbatches)
        output = model(**{name: value for name, value in microbatch.items() if name != ASIDE})
        return output, judge(microbatch)

    found: list[Tensor] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(inputs),
        seq_length=share * layout.cp_size,
        micro_batch_size=rows,
        **options,
    )
    return found


def _unchanged(of_last_stage: Tensor, *, non_loss_data: bool) -> Tensor:  # noqa: ARG001 - megatron-core's name
    return of_last_stage
