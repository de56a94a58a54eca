"""A model that learns: with gradient buffers, an optimizer over them, and an objective."""

import dataclasses

import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_7b.adapter import build_adapter
from megatron_7b.config.schema import RunConfig
from megatron_7b.errors import ConfigError
from megatron_7b.model.adapter import Adapter
from megatron_7b.model.core_config import params_dtype
from megatron_7b.model.kernels import why_no_transformer_engine
from megatron_7b.model.on_ranks import ModelOnRanks, build_on_ranks
from megatron_7b.objective import Objective, build_objective
from megatron_7b.objective.distillation import Distillation
from megatron_7b.objective.objective import Judging
from megatron_7b.optim.optimizer import Optimizer, wrap_data_parallel
from megatron_7b.parallel import ParallelLayout
from megatron_7b.parallel.groups import connect_groups, process_groups
from megatron_7b.runtime.cpu.allocator import keep_freed_memory
from megatron_7b.runtime.machine.device import DeviceType
from megatron_7b.runtime.machine.host_memory import own_bytes
from megatron_7b.runtime.machine.part_clock import PartClock
from megatron_7b.training.teacher import Teacher, build_teacher, projections_of
from megatron_7b.training.teacher_check import shape_of_teacher


@dataclasses.dataclass(frozen=True)
class Learner:
    """Everything that a training step computes with.

    Attributes:
        on_ranks: This rank's part of the model, and where it is.
        model: Its chunks, with gradient buffers.
        optimizer: Over their parameters.
        objective: What they are trained for.
        clock: Counts the time of the parts of a step.
        bytes_before: What this process held before, in memory of the device that it computes on.
        teacher: What they learn from beside their data, if there is one.
    """

    on_ranks: ModelOnRanks
    model: list[DistributedDataParallel]
    optimizer: Optimizer
    objective: Objective
    clock: PartClock
    bytes_before: int = 0
    teacher: Teacher | None = None

    @property
    def config(self) -> RunConfig:
        """The effective configuration: `model.vocab_size` is filled in."""
        return self.on_ranks.config

    @property
    def judging(self) -> Judging:
        """What is made of the model's output: by the objective, and what the teacher adds to it."""
        how = self.config.distillation
        return Distillation(self.objective, how) if how.is_used else self.objective

    @property
    def layout(self) -> ParallelLayout:
        """Position of this rank."""
        return self.on_ranks.layout

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        return self.on_ranks.device


def build_learner(config: RunConfig, device_type: DeviceType, *, adapter: Adapter | None = None) -> Learner:
    """Build model and optimizer on the ranks of the default process group.

    Args:
        config: The run; `model.vocab_size` is set.
        device_type: Where to compute.
        adapter: Added to the model; only what it trains gets gradient buffers and optimizer state. None: the one that
            the configuration asks for.

    Collective: all ranks.

    Raises:
        ConfigError: The layout does not fit the number of ranks, a kernel was asked for that is not there, or the model
            cannot fit into memory.
    """
    state_dtype, missing = config.precision.optimizer_state_dtype, why_no_transformer_engine(device_type)
    if state_dtype != "fp32" and missing is not None:
        raise ConfigError(
            f"precision.optimizer_state_dtype is {state_dtype!r}, which needs Transformer Engine, but {missing}",
            hint="set it to fp32, or on a machine with a GPU: pip install 'megatron_7b[gpu]'",
        )
    parallel = config.parallel
    if config.model.num_moe_experts and parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        raise ConfigError(
            f"parallel.tensor_model_parallel_size is {parallel.tensor_model_parallel_size} without sequence "
            "parallelism: every tensor rank would send the same tokens to the experts",
            hint="add --parallel.sequence-parallel True",
        )
    before = own_bytes() if device_type == "cpu" else torch.cuda.memory_allocated()
    if device_type == "cpu":
        keep_freed_memory()
    adapter = adapter or build_adapter(config) or projections_of(config)
    on_ranks = build_on_ranks(config, device_type, is_training=True, adapter=adapter, teacher=shape_of_teacher(config))
    model = wrap_data_parallel(list(on_ranks.chunks), config, process_groups())
    optimizer = Optimizer(model, config, params_dtype(config.precision, device_type))
    if device_type == "cuda":  # NCCL; gloo connects groups when it makes them
        connect_groups(
            on_ranks.device,
            one_by_one=parallel.virtual_pipeline_model_parallel_size is not None,
            shares_embedding=config.model.share_embeddings_and_output_weights,
        )
    teacher = build_teacher(config, on_ranks) if config.distillation.teacher is not None else None
    clock = PartClock(device_type)
    taught_by = teacher.chunks if teacher is not None else []
    for told in (*model, *taught_by, *optimizer.parts):
        told.config.timers = clock
    return Learner(on_ranks, model, optimizer, build_objective(config), clock, before, teacher)
