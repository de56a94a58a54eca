"""All layouts of a run on a number of devices that may be worth a look, as configurations."""

from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from typing import Any

from megatron_7b.config.options import get_value
from megatron_7b.config.schema import ParallelConfig, RunConfig
from megatron_7b.parallel import ParallelLayout
from megatron_7b.planning.devices import Device

CHOSEN = (
    *(
        f"parallel.{name}"
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "virtual_pipeline_model_parallel_size",
            "context_parallel_size",
            "expert_model_parallel_size",
            "sequence_parallel",
            "use_distributed_optimizer",
            "overlap_grad_reduce",
            "overlap_param_gather",
            "recompute_granularity",
            "recompute_method",
            "recompute_num_layers",
        )
    ),
    "training.micro_batch_size",
)
"""The options that a plan decides on, unless they are given."""

_MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
_SHORTEST_SHARE = {"cuda": 2048, "cpu": 256}
"""Tokens that context parallelism leaves each rank at least."""
_MOST_CONTEXT = 16


@dataclass(frozen=True)
class Search:
    """What layouts are looked for.

    Attributes:
        config: The run; options of `CHOSEN` that are not given are replaced.
        world_size: Ranks, all of which shall be used.
        device: Of each rank.
        given: Paths of options that stay as they are.
    """

    config: RunConfig
    world_size: int
    device: Device
    given: Set[str] = frozenset()

    def candidates(self) -> Iterator[RunConfig]:
        """Yield configurations, most of which pass the checks of a run."""
        for tp, pp, cp in self._sizes():
            replicas = self.world_size // (tp * pp * cp)
            batch = self.config.training.global_batch_size
            if batch % replicas:
                continue
            for ep in self._expert_sizes(replicas * cp):
                for micro_batch in self._micro_batches(batch // replicas):
                    number = batch // replicas // micro_batch
                    for virtual in self._virtual_sizes(pp, number):
                        yield from self._recomputes(tp, pp, cp, ep, virtual, micro_batch, replicas * cp)

    def _allowed(self, name: str, sizes: Iterator[int]) -> Iterator[int]:
        path = f"parallel.{name}"
        if path not in self.given:
            return sizes
        value = get_value(self.config, path)
        return (size for size in sizes if size == value)

    def _sizes(self) -> Iterator[tuple[int, int, int]]:
        """Yield sizes of tensor, pipeline and context parallelism, of which the first stays within a node."""
        model, world_size = self.config.model, self.world_size
        is_decoder = model.traits.kind == "decoder"
        per_rank = _SHORTEST_SHARE[self.device.type]
        for tp in self._allowed("tensor_model_parallel_size", divisors(min(self.device.node_size, world_size))):
            if world_size % tp or model.query_groups % tp:
                continue
            for pp in self._allowed("pipeline_model_parallel_size", divisors(world_size // tp)):
                if model.num_layers % pp:
                    continue
                for cp in self._allowed("context_parallel_size", divisors(world_size // (tp * pp))):
                    is_small = self.config.data.seq_length < per_rank * cp or not is_decoder or cp > _MOST_CONTEXT
                    if cp > 1 and is_small and "parallel.context_parallel_size" not in self.given:
                        continue
                    yield tp, pp, cp

    def _expert_sizes(self, sharing: int) -> Iterator[int]:
        experts = self.config.model.num_moe_experts
        sizes = iter((1,)) if experts is None else (size for size in divisors(experts) if sharing % size == 0)
        return self._allowed("expert_model_parallel_size", sizes)

    def _micro_batches(self, per_replica: int) -> Iterator[int]:
        if "training.micro_batch_size" in self.given:
            size = self.config.training.micro_batch_size
            return iter((size,) if per_replica % size == 0 else ())
        return (size for size in _MICRO_BATCHES if per_replica % size == 0)

    def _virtual_sizes(self, pp: int, num_microbatches: int) -> Iterator[int | None]:
        if "parallel.virtual_pipeline_model_parallel_size" in self.given:
            yield self.config.parallel.virtual_pipeline_model_parallel_size
            return
        yield None
        if pp > 1 and num_microbatches % pp == 0:
            yield from (size for size in divisors(self.config.model.num_layers // pp) if 1 < size <= 10)

    def _recomputes(
        self, tp: int, pp: int, cp: int, ep: int, virtual: int | None, micro_batch: int, replicas: int
    ) -> Iterator[RunConfig]:
        parallel, on_gpu = self.config.parallel, self.device.type == "cuda"
        precision = self.config.precision
        needs_sharding = precision.fp8_param_gather or precision.optimizer_state_dtype == "bf16"
        sharded = replicas > 1 or needs_sharding
        chosen: dict[str, Any] = {
            "tensor_model_parallel_size": tp,
            "pipeline_model_parallel_size": pp,
            "virtual_pipeline_model_parallel_size": virtual,
            "context_parallel_size": cp,
            "expert_model_parallel_size": ep,
            "sequence_parallel": tp > 1,
            "use_distributed_optimizer": sharded,
            "overlap_grad_reduce": sharded and replicas > 1 and on_gpu,
            "overlap_param_gather": sharded and replicas > 1 and on_gpu,
        }
        stage = self.config.model.num_layers // (pp * (virtual or 1))
        for recompute in self._recompute_options(stage):
            values = {
                name: value for name, value in {**chosen, **recompute}.items() if f"parallel.{name}" not in self.given
            }
            yield replace(
                self.config,
                parallel=replace(parallel, **values),
                training=replace(self.config.training, micro_batch_size=micro_batch),
            )

    def _recompute_options(self, stage: int) -> Iterator[dict[str, Any]]:
        """Yield nothing, half of the layers, and all of them."""
        if "parallel.recompute_granularity" in self.given:
            yield {}
            return
        plain = ParallelConfig()
        yield {
            name: getattr(plain, name) for name in ("recompute_granularity", "recompute_method", "recompute_num_layers")
        }
        if stage >= 2:
            half = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": stage // 2}
            yield half
        yield {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def layout_of(config: RunConfig, world_size: int, pp_rank: int = 0) -> ParallelLayout:
    """Return the position of the first rank of a pipeline stage."""
    parallel = config.parallel
    return ParallelLayout(
        world_size=world_size,
        rank=pp_rank * (world_size // parallel.pipeline_model_parallel_size),
        tp_size=parallel.tensor_model_parallel_size,
        cp_size=parallel.context_parallel_size,
        pp_size=parallel.pipeline_model_parallel_size,
        ep_size=parallel.expert_model_parallel_size,
        num_chunks=parallel.virtual_pipeline_model_parallel_size or 1,
    )


def divisors(number: int) -> Iterator[int]:
    """Yield what divides a number, in ascending order."""
    return (candidate for candidate in range(1, number + 1) if number % candidate == 0)
