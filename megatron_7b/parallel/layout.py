"""The rank grid as pure functions: which rank holds what, without any process group.

Source: megatron-core's default order `tp-cp-ep-dp-pp`: tensor ranks are neighbours, pipeline stages are farthest apart.
"""

from dataclasses import dataclass

from megatron_7b.config.schema import ParallelConfig
from megatron_7b.config.stages import divide_layers
from megatron_7b.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """Position of one rank on the axes (pp, dp, cp, tp), slowest first."""

    world_size: int
    rank: int
    tp_size: int
    cp_size: int
    pp_size: int
    ep_size: int = 1
    num_chunks: int
    """Model chunks per pipeline rank: 1, or the virtual pipeline size."""
    stages: tuple[int, ...] = ()
    """Layers of each stage, in the order of the model; empty: as `divide_layers` has it."""

    @property
    def dp_size(self) -> int:
        """Number of replicas of the model."""
        return self.world_size // (self.tp_size * self.cp_size * self.pp_size)

    @property
    def tp_rank(self) -> int:
        """Index on the tensor-parallel axis."""
        return self.rank % self.tp_size

    @property
    def cp_rank(self) -> int:
        """Index on the context-parallel axis."""
        return self.rank // self.tp_size % self.cp_size

    @property
    def dp_rank(self) -> int:
        """Index on the data-parallel axis."""
        return self.rank // (self.tp_size * self.cp_size) % self.dp_size

    @property
    def ep_rank(self) -> int:
        """Index on the axis of experts, which runs over context- and data-parallel ranks: which experts it holds."""
        return self.rank // self.tp_size % self.ep_size

    @property
    def pp_rank(self) -> int:
        """Index on the pipeline axis."""
        return self.rank // (self.tp_size * self.cp_size * self.dp_size)

    def layers_of(self, num_layers: int, pp_rank: int) -> int:
        """Return how many of a model's layers the ranks of a place on the pipeline axis have, in all their chunks."""
        stages = self.stages or divide_layers(num_layers, self.pp_size * self.num_chunks)
        return sum(stages[pp_rank :: self.pp_size])

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.pp_rank == self.pp_size - 1

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what exists once: run folder, log."""
        return self.rank == 0

    def __str__(self) -> str:
        parts = [f"TP{self.tp_size}", f"PP{self.pp_size}"]
        if self.num_chunks > 1:
            parts.append(f"VPP{self.num_chunks}")
        if self.cp_size > 1:
            parts.append(f"CP{self.cp_size}")
        if self.ep_size > 1:
            parts.append(f"EP{self.ep_size}")
        return "×".join([*parts, f"DP{self.dp_size}"])


def build_layout(parallel: ParallelConfig, *, world_size: int, rank: int) -> ParallelLayout:
    """Return the place of `rank` in the grid.

    Raises:
        ConfigError: The world size is not a multiple of tp × pp × cp, or experts cannot be shared evenly.
    """
    model_size = parallel.model_parallel_size
    if world_size % model_size:
        raise ConfigError(
            f"{world_size} ranks cannot hold tensor × pipeline × context = "
            f"{parallel.tensor_model_parallel_size} × {parallel.pipeline_model_parallel_size} × "
            f"{parallel.context_parallel_size} = {model_size} parts of a model",
            hint=f"start a multiple of {model_size} ranks (--nproc)",
        )
    experts = parallel.expert_model_parallel_size
    sharing = world_size // model_size * parallel.context_parallel_size
    if sharing % experts:
        raise ConfigError(
            f"parallel.expert_model_parallel_size is {experts}, which does not divide context × data parallel = "
            f"{sharing} ranks",
            hint="experts are shared by ranks that have the same part of everything else",
        )
    return ParallelLayout(
        world_size=world_size,
        rank=rank,
        tp_size=parallel.tensor_model_parallel_size,
        cp_size=parallel.context_parallel_size,
        pp_size=parallel.pipeline_model_parallel_size,
        ep_size=experts,
        num_chunks=parallel.virtual_pipeline_model_parallel_size or 1,
        stages=parallel.pipeline_model_parallel_layout,
    )
