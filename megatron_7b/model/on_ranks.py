"""A model on the ranks of the default process group: the one place where groups are made and a model is built."""

import dataclasses
import math

import torch
import torch.distributed as dist

from megatron_7b import upstream
from megatron_7b.config.schema import RunConfig
from megatron_7b.errors import ConfigError
from megatron_7b.model.adapter import Adapter
from megatron_7b.model.builder import build_model
from megatron_7b.model.fitting import check_rank
from megatron_7b.model.kinds import parameter_table
from megatron_7b.model.kinds.chunk import ModelChunk
from megatron_7b.model.parameters import ParameterTable
from megatron_7b.parallel import ParallelLayout
from megatron_7b.parallel.groups import initialize_model_parallel, process_groups
from megatron_7b.runtime.machine.device import DeviceType, torch_device


@dataclasses.dataclass(frozen=True)
class ModelOnRanks:
    """This rank's part of a model.

    Attributes:
        config: The configuration that the model was built with.
        layout: Position of this rank.
        device_type: Where it computes.
        chunks: One per virtual pipeline stage.
        adapter: What was added to it.
    """

    config: RunConfig
    layout: ParallelLayout
    device_type: DeviceType
    chunks: list[ModelChunk]
    adapter: Adapter | None = None

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        return torch_device(self.device_type)

    @property
    def adapter_names(self) -> frozenset[str]:
        """Names of the parameters that the adapter adds."""
        return self.adapter.own_names(self._own_table) if self.adapter is not None else frozenset()

    @property
    def names_apart(self) -> frozenset[str] | None:
        """Names of the parameters that checkpoints hold; None: all of them."""
        return self.adapter.trained_names(self._own_table) if self.adapter and self.adapter.is_apart else None

    @property
    def num_trained(self) -> int:
        """Number of parameters of the whole model that are trained, without vocabulary padding."""
        table = self._own_table
        if self.adapter is None:
            return sum(math.prod(row.shape) for row in table.values())
        names = self.adapter.trained_names(table)
        return sum(math.prod(row.shape) for row in self.adapter.extended(table).values() if row.name in names)

    @property
    def _own_table(self) -> ParameterTable:
        """The model's parameters without those of the adapter."""
        return parameter_table(self.config.model, self.config.model.vocab_size or 1)

    @property
    def only_chunk(self) -> ModelChunk:
        """The one chunk of a model without virtual pipeline stages."""
        (chunk,) = self.chunks
        return chunk


def build_on_ranks(
    config: RunConfig,
    device_type: DeviceType,
    *,
    is_training: bool,
    initialize: bool = True,
    adapter: Adapter | None = None,
    teacher: RunConfig | None = None,
) -> ModelOnRanks:
    """Make the process groups of the layout, and build this rank's part of the model.

    Args:
        config: The run; `model.vocab_size` is set.
        device_type: Where to compute.
        is_training: Memory for gradients and optimizer state is needed as well.
        initialize: Fill the parameters from the seed; otherwise they are undefined until weights are loaded.
        adapter: Added to the model; only what it trains gets gradients.
        teacher: The configuration of a model that will be built beside it, which needs memory too.

    Collective: all ranks.

    Raises:
        ConfigError: The layout does not fit the number of ranks, a kernel was asked for that is not there, or the model
            cannot fit into memory.
    """
    if config.model.vocab_size is None:
        raise ConfigError("model.vocab_size is not set", hint="take the configuration from inference_config")
    check_rank(
        config,
        on_gpu=device_type == "cuda",
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        is_training=is_training,
        adapter=adapter,
        teacher=teacher,
    )
    uses_graphs = config.runtime.cuda_graph_impl != "none"
    layout = initialize_model_parallel(
        config.parallel,
        seed=config.training.seed,
        timeout_minutes=config.runtime.distributed_timeout_minutes,
        graph_safe_random=uses_graphs,
    )
    if uses_graphs:
        upstream.let_layers_be_graphs()
    chunks = build_model(
        config,
        vocab_size=config.model.vocab_size,
        layout=layout,
        groups=process_groups(),
        device_type=device_type,
        initialize=initialize,
        adapter=adapter,
    )
    return ModelOnRanks(config, layout, device_type, chunks, adapter)


def build_beside(first: ModelOnRanks, config: RunConfig, *, adapter: Adapter | None = None) -> ModelOnRanks:
    """Build another model on the groups of one that exists; its parameters are undefined until weights are loaded.

    Args:
        first: The model that is there.
        config: Of the other one, with the same layout.
        adapter: Added to the other one.

    Collective: all ranks.
    """
    assert config.parallel == first.config.parallel, "the groups are those of another layout"
    assert config.model.vocab_size is not None
    chunks = build_model(
        config,
        vocab_size=config.model.vocab_size,
        layout=first.layout,
        groups=process_groups(),
        device_type=first.device_type,
        initialize=False,
        adapter=adapter,
    )
    return ModelOnRanks(config, first.layout, first.device_type, chunks, adapter)
