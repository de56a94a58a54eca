"""All layouts of a run on a number of devices that may be worth a look, as configurations."""

import math
from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from typing import Any

from megatron_7b.config.optimizers import OPTIMIZERS
from megatron_7b.config.options import get_value
from megatron_7b.config.schema import ParallelConfig, RunConfig
from megatron_7b.config.stages import divide_layers
from megatron_7b.parallel import ParallelLayout
from megatron_7b.planning.devices import Device

CHOSEN = (
    *(
        f"parallel.{name}"
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "virtual_pipeline_model_parallel_size",
            "pipeline_model_parallel_layout",
            "context_parallel_size",
            "expert_model_parallel_size",
            "sequence_parallel",
            "use_distributed_optimizer",
            "overlap_grad_reduce",
            "overlap_param_gather",
            "recompute_granularity",
            "recompute_modules",
            "recompute_method",
            "recompute_num_layers",
        )
    ),
    "training.micro_batch_size",
)
"""The options that a plan decides on, unless they are given."""

FORMATS = ("precision.optimizer_state_dtype", "precision.grad_reduce_in_fp32")
"""Number formats that a plan makes narrower, unless they are given: results then differ in their last digits."""

_MOST_AT_ONCE = 32
"""Sequences of a micro batch."""
_MOST_CHUNKS = 10
"""Virtual stages of a pipeline rank."""
_SHORTEST_SHARE = {"cuda": 2048, "cpu": 256}
"""Tokens that context parallelism leaves each rank at least."""
_MOST_CONTEXT = 16
_RECOMPUTED_PARTS = (0.25, 0.5, 0.75)
_TIME_OF_MODULES = {"core_attn": 0.2, "mlp": 0.6, "moe": 0.8}
"""About the share of a forward pass, which decides the order in which recompute is tried."""
_RECOMPUTE = ("recompute_granularity", "recompute_modules", "recompute_method", "recompute_num_layers")


@dataclass(frozen=True)
class Search:
    """What layouts are looked for.

    Attributes:
        config: The run; options of `CHOSEN` that are not given are replaced.
        world_size: Ranks, all of which shall be used.
        device: Of each rank.
        given: Paths of options that stay as they are.
        head_layers: How many layers take as long as the output layer with the loss.
    """

    config: RunConfig
    world_size: int
    device: Device
    given: Set[str] = frozenset()
    head_layers: float = 0.0

    def candidates(self) -> Iterator[RunConfig]:
        """Yield configurations, most of which pass the checks of a run."""
        for by_recompute in self.layouts():
            yield from by_recompute

    def layouts(self) -> Iterator[Iterator[RunConfig]]:
        """Yield the configurations of each layout, which differ in recompute: the fastest first, the smallest last."""
        for tp, pp, cp in self._sizes():
            replicas = self.world_size // (tp * pp * cp)
            batch = self.config.training.global_batch_size
            if batch % replicas:
                continue
            for ep in self._expert_sizes(replicas * cp):
                for micro_batch in self._micro_batches(batch // replicas):
                    number = batch // replicas // micro_batch
                    for virtual in self._virtual_sizes(pp, number):
                        for stages in self._divisions(pp * (virtual or 1)):
                            yield self._recomputes(tp, pp, cp, ep, virtual, stages, micro_batch, replicas * cp)

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
                if model.num_layers % pp and (not is_decoder or pp > model.num_layers):
                    continue  # only decoders have uneven stages
                for cp in self._allowed("context_parallel_size", divisors(world_size // (tp * pp))):
                    is_small = self.config.data.seq_length < per_rank * cp or not is_decoder or cp > _MOST_CONTEXT
                    is_unwise = is_small or self._is_whole
                    if cp > 1 and is_unwise and "parallel.context_parallel_size" not in self.given:
                        continue
                    yield tp, pp, cp

    @property
    def _is_whole(self) -> bool:
        """Whether Transformer Engine would be asked to cut texts with windows, or documents, which a run refuses."""
        uses_engine = self.device.type == "cuda" and self.config.model.transformer_impl != "local"
        return uses_engine and (self.config.model.window_size is not None or self.config.data.reset_attention_mask)

    def _expert_sizes(self, sharing: int) -> Iterator[int]:
        experts = self.config.model.num_moe_experts
        sizes = iter((1,)) if experts is None else (size for size in divisors(experts) if sharing % size == 0)
        return self._allowed("expert_model_parallel_size", sizes)

    def _micro_batches(self, per_replica: int) -> Iterator[int]:
        if "training.micro_batch_size" in self.given:
            size = self.config.training.micro_batch_size
            return iter((size,) if per_replica % size == 0 else ())
        return (size for size in divisors(per_replica) if size <= _MOST_AT_ONCE)

    def _virtual_sizes(self, pp: int, num_microbatches: int) -> Iterator[int | None]:
        if "parallel.virtual_pipeline_model_parallel_size" in self.given:
            yield self.config.parallel.virtual_pipeline_model_parallel_size
            return
        yield None
        layers = self.config.model.num_layers
        if pp > 1 and num_microbatches % pp == 0:
            for size in range(2, min(layers // pp, _MOST_CHUNKS) + 1):
                chunks = divide_layers(layers, pp * size)
                # Chunks that ranks compute at the same time may not be so uneven that a microbatch takes longer.
                if sum(max(chunks[first : first + pp]) for first in range(0, pp * size, pp)) == -(-layers // pp):
                    yield size

    def _divisions(self, num_stages: int) -> Iterator[tuple[int, ...]]:
        """Yield the usual division of layers into stages, and one that counts the output layer on the last stage."""
        if "parallel.pipeline_model_parallel_layout" in self.given:
            stages = self.config.parallel.pipeline_model_parallel_layout
            if len(stages) in (0, num_stages):
                yield stages
            return
        yield ()
        if num_stages > 1 and self.config.model.traits.kind == "decoder":
            model = self.config.model
            balanced = balance_layers(model.num_layers, num_stages, self.head_layers)
            if balanced != divide_layers(model.num_layers, num_stages):
                yield balanced

    def _recomputes(
        self,
        tp: int,
        pp: int,
        cp: int,
        ep: int,
        virtual: int | None,
        stages: tuple[int, ...],
        micro_batch: int,
        replicas: int,
    ) -> Iterator[RunConfig]:
        parallel, on_gpu = self.config.parallel, self.device.type == "cuda"
        precision = self.config.precision
        needs_sharding = precision.fp8_param_gather or precision.optimizer_state_dtype == "bf16"
        sharded = replicas > 1 or needs_sharding
        chosen: dict[str, Any] = {
            "tensor_model_parallel_size": tp,
            "pipeline_model_parallel_size": pp,
            "virtual_pipeline_model_parallel_size": virtual,
            "pipeline_model_parallel_layout": stages,
            "context_parallel_size": cp,
            "expert_model_parallel_size": ep,
            "sequence_parallel": tp > 1,
            "use_distributed_optimizer": sharded,
            "overlap_grad_reduce": sharded and replicas > 1 and on_gpu,
            "overlap_param_gather": sharded and replicas > 1 and on_gpu,
        }
        stage = min(stages or divide_layers(self.config.model.num_layers, pp * (virtual or 1)))
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
        """Yield nothing, the widest part of each layer, quarters of the layers of a stage, and all of them."""
        if "parallel.recompute_granularity" in self.given:
            yield {}
            return
        plain = {name: getattr(ParallelConfig(), name) for name in _RECOMPUTE}
        yield plain
        parts = {round(stage * part): part for part in _RECOMPUTED_PARTS}
        options = {
            part: {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": number}
            for number, part in parts.items()
            if 0 < number < stage
        }
        if modules := self._recomputable():
            options[_TIME_OF_MODULES[modules[-1]]] = {
                "recompute_granularity": "selective",
                "recompute_modules": modules,
            }
        for part in sorted(options):
            yield {**plain, **options[part]}
        yield {**plain, "recompute_granularity": "full"}

    def _recomputable(self) -> tuple[str, ...]:
        """Return the modules that are worth to be computed again by themselves."""
        model = self.config.model
        if "parallel.recompute_modules" in self.given:
            return self.config.parallel.recompute_modules
        if model.traits.kind != "decoder" or model.traits.add_bias_linear or self.device.type == "cpu":
            return ()  # megatron-core's MLP with biases cannot; on a CPU, freed memory is kept
        return ("mlp",) if model.num_moe_experts is None else ("moe",)


def narrower_formats(config: RunConfig, device: Device, given: Set[str]) -> Iterator[dict[str, object]]:
    """Yield narrower number formats of what the optimizer keeps, by path: moments in BF16, then gradients as well."""
    precision, traits = config.precision, OPTIMIZERS[config.optimizer.name]
    if device.type == "cpu" or config.adapter.is_used or config.model.transformer_impl == "local":
        return  # they need Transformer Engine; the state of an adapter is small
    changed: dict[str, object] = {}
    is_free = FORMATS[0] not in given and not config.optimizer.cpu_offload
    if precision.optimizer_state_dtype == "fp32" and is_free and traits.has_moments:
        changed[FORMATS[0]] = "bf16"
        yield dict(changed)
    if precision.grad_reduce_in_fp32 and precision.params_dtype != "fp32" and FORMATS[1] not in given:
        changed[FORMATS[1]] = False
        yield changed


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
        stages=parallel.pipeline_model_parallel_layout,
    )


def fullest_stages(layout: ParallelLayout, num_layers: int) -> Iterator[int]:
    """Yield the pipeline ranks one of which holds most: the first, the last, and of others the first of each size.

    Earlier stages hold the activations of more microbatches.
    """
    last, seen = layout.pp_size - 1, set()
    yield 0
    for stage in range(1, last):
        layers = layout.layers_of(num_layers, stage)
        if layers not in seen:
            seen.add(layers)
            yield stage
    if last:
        yield last


def balance_layers(num_layers: int, num_stages: int, head_layers: float) -> tuple[int, ...]:
    """Return layers of each stage such that the last has as much to do as the others, with the output layer.

    Args:
        num_layers: Of the model.
        num_stages: At most as many.
        head_layers: How many layers take as long as the output layer.
    """
    share = (num_layers + head_layers) / num_stages
    last = max(1, round(share - head_layers))
    return (*divide_layers(num_layers - last, num_stages - 1), last)


def divisors(number: int) -> Iterator[int]:
    """Yield what divides a number, in ascending order."""
    small = [candidate for candidate in range(1, math.isqrt(number) + 1) if number % candidate == 0]
    return iter(sorted({*small, *(number // candidate for candidate in small)}))
