"""Training steps at one layout, with everything that can be compared: losses, gradients and weights of every rank."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_7b.config import RunConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from megatron_7b.model.kinds.chunk import ModelChunk
    from megatron_7b.model.parameters import Parameter
    from megatron_7b.optim.optimizer import StepOutcome
    from megatron_7b.training.learner import Learner

type Place = tuple[tuple[tuple[int, int], ...], tuple[int, int] | None]
"""Which rows of a whole parameter a shard holds, in order, and which of its columns; None: all."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """A rank's part of one parameter.

    Attributes:
        name: Of the parameter, the same at every layout.
        number: Of the parameter, in the order of the forward pass.
        place: Where it belongs.
        shape: Of the whole, without vocabulary padding.
        value: Its values, in FP32.
    """

    name: str
    number: int
    place: Place
    shape: tuple[int, ...]
    value: Any


@dataclasses.dataclass(frozen=True)
class RecordedStep:
    """What one rank has at one step.

    Attributes:
        loss: Of the step, the same on all ranks.
        grad_norm: Of all gradients before clipping, the same on all ranks.
        gradients: Before clipping.
        weights: After the update.
    """

    loss: float
    grad_norm: float
    gradients: list[Shard]
    weights: list[Shard]


def file_of(folder: Path, step: int, rank: int) -> Path:
    """Return where a rank records a step; 0 are the initial weights."""
    return folder / f"step_{step:06d}_rank_{rank:05d}.pt"


def in_fp32(config: RunConfig) -> RunConfig:
    """Return the same run without any rounding to a shorter number format."""
    precision = dataclasses.replace(config.precision, params_dtype="fp32", fp8="none", optimizer_state_dtype="fp32")
    return dataclasses.replace(config, precision=dataclasses.replace(precision, fp8_param_gather=False))


def record_steps(config: RunConfig, folder: Path, num_steps: int, *, from_rounded: bool = False) -> None:
    """Start a run, do a few steps, and write what each rank has at each of them; nothing else is written.

    Args:
        config: The run, checked.
        folder: An existing folder that all ranks can write to, empty but for files of other layouts' folders.
        num_steps: How many.
        from_rounded: Round the initial weights to BF16, which those of a run in BF16 are.

    Collective: all ranks of the launcher's world.

    Raises:
        MegatronError: The run is impossible.
    """
    import torch

    from megatron_7b.runtime.process.signals import StopRequest
    from megatron_7b.training.checkpointing import load_starting_point
    from megatron_7b.training.loop import do_step
    from megatron_7b.training.reference import provide_reference
    from megatron_7b.training.run_folder import RunFolder
    from megatron_7b.training.start import open_run

    with open_run(config, RunFolder(folder / "run"), StopRequest(0.0)) as run:
        load_starting_point(run)
        if from_rounded:
            _round_weights(run.learner)
        provide_reference(run)
        learner, rank = run.learner, run.ranks.rank
        recorder = _Recorder(learner)
        run.trainer.learner = dataclasses.replace(learner, optimizer=recorder)  # type: ignore[arg-type]
        torch.save(RecordedStep(0.0, 0.0, [], list(_weights(learner))), file_of(folder, 0, rank))
        for step in range(1, num_steps + 1):
            metrics = do_step(run)
            done = RecordedStep(metrics.loss, metrics.grad_norm, recorder.gradients, list(_weights(learner)))
            torch.save(done, file_of(folder, step, rank))


def _round_weights(learner: "Learner") -> None:
    """Round the parameters to BF16, and keep them in FP32."""
    import torch

    from megatron_7b.optim.state import renew_main_parameters

    with torch.no_grad():
        for chunk in learner.model:
            for parameter in chunk.module.parameters():
                if parameter.is_floating_point():
                    parameter.copy_(parameter.bfloat16())
    renew_main_parameters(learner.optimizer)


class _Recorder:
    """Stands for the optimizer of a learner, and keeps the gradients that it is given."""

    def __init__(self, learner: "Learner") -> None:
        self._learner = learner
        self.gradients: list[Shard] = []

    def zero_grad(self) -> None:
        self._learner.optimizer.zero_grad()

    def step(self, learning_rate: float) -> "StepOutcome":
        self.gradients = list(_gradients(self._learner))
        return self._learner.optimizer.step(learning_rate)


def _gradients(learner: "Learner") -> "Iterator[Shard]":
    """Yield the gradient of each trained parameter, summed over all replicas. Collective: data-parallel groups."""
    if learner.config.parallel.use_distributed_optimizer:
        _gather_gradients(learner)
    for chunk in learner.model:
        for number, row, parameter in _numbered(chunk.module):
            if parameter.requires_grad:
                yield _shard(number, row, parameter.main_grad, learner)


def _gather_gradients(learner: "Learner") -> None:
    """Complete the gradient buffers, of which the distributed optimizer has each rank hold the sums of its share only.

    Collective: data-parallel groups.
    """
    import torch.distributed as dist

    for chunk in learner.model:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                shares = list(bucket.grad_data.chunk(dist.get_world_size(group)))
                dist.all_gather(shares, shares[dist.get_rank(group)].clone(), group=group)


def _weights(learner: "Learner") -> "Iterator[Shard]":
    from megatron_7b.optim.optimizer import gather_parameters

    gather_parameters(learner.model)
    for chunk in learner.model:
        for number, row, parameter in _numbered(chunk.module):
            if parameter.is_floating_point() and parameter.requires_grad:
                yield _shard(number, row, parameter.detach(), learner)


def _numbered(chunk: "ModelChunk") -> "Iterator[tuple[int, Parameter, Any]]":
    """Yield the parameters of a chunk with their numbers in the forward pass, in which they are not registered."""
    from megatron_7b.model.builder import described_parameters

    numbers = {name: number for number, name in enumerate(chunk.table)}
    for row, parameter in described_parameters(chunk):
        yield numbers[row.name], row, parameter


def _shard(number: int, row: "Parameter", value: "Tensor", learner: "Learner") -> Shard:
    """Return a rank's part of a parameter or of its gradient, without the rows that only pad a vocabulary."""
    from megatron_7b.model.initialization import shard_ranges

    layout, shape = learner.layout, row.shape
    rows, columns = tuple(shard_ranges(row, layout.tp_rank, layout.tp_size)), None
    if row.tp_dim == 1 and layout.tp_size > 1:
        width = shape[1] // layout.tp_size
        columns = (layout.tp_rank * width, (layout.tp_rank + 1) * width)
    value = value.detach().float().cpu().clone()
    if row.is_padded:
        vocabulary = learner.config.model.vocab_size
        assert vocabulary is not None
        shape = (vocabulary, *shape[1:])
        (first, last) = rows[0]
        rows = ((min(first, vocabulary), min(last, vocabulary)),)
        value = value[: rows[0][1] - rows[0][0]]
    return Shard(row.name, number, (rows, columns), shape, value)
