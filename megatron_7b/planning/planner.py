"""A plan: which layouts of a run fit on given devices, how fast each is, and what it waits for."""

from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, replace

from megatron_7b.adapter import build_adapter
from megatron_7b.config import check_config
from megatron_7b.config.conflicts import find_conflicts
from megatron_7b.config.options import get_value, options
from megatron_7b.config.problems import shown
from megatron_7b.config.rule import nearest_multiples
from megatron_7b.config.schema import ModelConfig, ParallelConfig, RunConfig
from megatron_7b.errors import ConfigError
from megatron_7b.model.sizes import flops_per_token
from megatron_7b.planning.counts import ModelCounts
from megatron_7b.planning.devices import Device, find_device
from megatron_7b.planning.layouts import CHOSEN, Search, layout_of
from megatron_7b.planning.memory import RankMemory, rank_memory, working_width
from megatron_7b.planning.step_time import StepTime, StepTimer
from megatron_7b.planning.teacher import Teacher

_FILLED = 0.96
"""Of a device's memory may be used: what is predicted to fill it entirely would not run."""
_PRICE_OF_MEANS = 0.003
"""A layout with one means more (tensor, pipeline, … parallelism) must be faster by this share to be preferred."""
_ASSUMED_VOCABULARY = 32_000


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One layout of a run.

    Attributes:
        config: The run at this layout.
        world_size: Its ranks.
        memory: Of the rank that holds most.
        available_memory: Of its device.
        time: Of a step.
        tokens_per_second_per_gpu: That the run reads.
        tflops_per_gpu: Of the model itself: causal attention, nothing counted for recompute.
        mfu: These as a share of the device's rate in the format of the run.
    """

    config: RunConfig
    world_size: int
    memory: RankMemory
    available_memory: int
    time: StepTime
    tokens_per_second_per_gpu: float
    tflops_per_gpu: float
    mfu: float

    @property
    def fits(self) -> bool:
        """Whether its fullest rank fits into its device, with a few percent to spare."""
        return self.memory.total <= _FILLED * self.available_memory

    @property
    def num_microbatches(self) -> int:
        """That each replica takes one after the other in a step."""
        training = self.config.training
        return training.global_batch_size // (
            training.micro_batch_size * layout_of(self.config, self.world_size).dp_size
        )

    @property
    def means(self) -> int:
        """How many kinds of parallelism and recompute it needs beside data parallelism."""
        parallel = self.config.parallel
        return sum(
            (
                parallel.tensor_model_parallel_size > 1,
                parallel.pipeline_model_parallel_size > 1,
                parallel.virtual_pipeline_model_parallel_size is not None,
                parallel.context_parallel_size > 1,
                parallel.expert_model_parallel_size > 1,
                parallel.recompute_granularity != "none",
            )
        )

    @property
    def limit(self) -> str:
        """What it has too little of: memory, with the largest kind, or time, with the part to look at first."""
        if not self.fits:
            kinds = {name: size for name, size in self.memory.as_dict().items() if name != "total"}
            largest = max(kinds, key=lambda name: kinds[name])
            missing = (self.memory.total - _FILLED * self.available_memory) / 1e9
            return f"memory: {missing:,.1f} GB too much, {largest} {kinds[largest] / 1e9:,.1f}"
        parts = {name: seconds for name, seconds in self.time.as_dict().items() if name != "total"}
        others = {name: seconds for name, seconds in parts.items() if name != "matrix_products"}
        largest = max(others, key=lambda name: others[name])
        share = others[largest] / self.time.total
        name = "matrix_products" if share < 0.1 else largest
        return f"{name.replace('_', ' ')} {100 * parts[name] / self.time.total:.0f} %"

    def layout(self) -> dict[str, object]:
        """Return sizes and options of the layout by their names in the configuration."""
        parallel, training = self.config.parallel, self.config.training
        names = [path.removeprefix("parallel.") for path in CHOSEN if path.startswith("parallel.")]
        return {
            **{name: getattr(parallel, name) for name in names},
            "data_parallel_size": layout_of(self.config, self.world_size).dp_size,
            "micro_batch_size": training.micro_batch_size,
            "num_microbatches": self.num_microbatches,
        }

    def settings(self) -> dict[str, object]:
        """Return the options that make a run of this layout, by dotted path: all that a plan decides on."""
        return {path: get_value(self.config, path) for path in CHOSEN}

    def options(self, node_size: int) -> Iterator[str]:
        """Yield the words that a run of this layout needs on its command line, beside those of the run itself.

        Args:
            node_size: Devices per node.
        """
        nodes = self.world_size // node_size
        yield f"--nproc {self.world_size}" if nodes <= 1 else f"--nnodes {nodes} --nproc {node_size}"
        for path, value in self.settings().items():
            if value != options()[path].default:
                yield f"{options()[path].flag} {shown(value)}"

    def as_dict(self) -> dict[str, object]:
        """Return everything, as `megatron-7b plan --json` prints it."""
        return {
            "fits": self.fits,
            "layout": self.layout(),
            "memory_bytes": self.memory.as_dict(),
            "step_seconds": self.time.as_dict(),
            "tokens_per_second_per_gpu": self.tokens_per_second_per_gpu,
            "tflops_per_gpu": self.tflops_per_gpu,
            "mfu": self.mfu,
            "limit": self.limit,
        }


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What was found.

    Attributes:
        config: The run that was planned, with its vocabulary.
        device: Of each rank.
        world_size: Ranks.
        candidates: The best of each layout: those that fit first, the fastest of them first; then those that do not,
            the smallest first.
        configured: The configuration as it is, if it can run on so many ranks.
        notes: What was assumed.
    """

    config: RunConfig
    device: Device
    world_size: int
    candidates: tuple[Candidate, ...]
    configured: Candidate | None
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> Candidate | None:
        """The first choice; None if nothing fits."""
        return self.candidates[0] if self.candidates[0].fits else None

    @property
    def fits(self) -> bool:
        """Whether any layout does."""
        return self.best is not None


class Planner:
    """Looks at layouts of one run on one kind of device.

    Args:
        config: The run; `model.vocab_size` is set.
        device: Of each rank.
        predicted_share: How many tokens pass the output layer, for each that is read.
        teacher: The shape of a model that the run learns from.
    """

    def __init__(
        self,
        config: RunConfig,
        device: Device,
        *,
        predicted_share: float = 1.0,
        teacher: ModelConfig | None = None,
    ) -> None:
        self._config, self._device = config, device
        self._teacher = None if teacher is None else Teacher(teacher, device)
        self._counts = ModelCounts(config.model, build_adapter(config))
        self._timer = StepTimer(self._counts, device, predicted_share=predicted_share)
        self._flops = flops_per_token(
            config.model, config.data.seq_length, predicted_share=predicted_share, is_frozen=config.adapter.is_used
        )

    def look_at(self, config: RunConfig, world_size: int) -> Candidate:
        """Return what one layout of the run takes, whether or not it may run."""
        last = config.parallel.pipeline_model_parallel_size - 1
        stages = [layout_of(config, world_size, stage) for stage in {0, last}]
        memories = [rank_memory(config, self._counts, layout, self._device) for layout in stages]
        time = self._timer.step_time(config, layout_of(config, world_size, last))
        if self._teacher is not None:
            memories = [
                self._teacher.add_memory(memory, config, layout)
                for memory, layout in zip(memories, stages, strict=True)
            ]
            time = self._teacher.add_time(time, config, layout_of(config, world_size, last))
        tokens = config.training.global_batch_size * config.data.seq_length / time.total / world_size
        kind = "fp8" if config.precision.fp8 != "none" else "bf16"
        if working_width(config, self._device) == 4:
            kind = "fp32"
        return Candidate(
            config=config,
            world_size=world_size,
            memory=max(memories, key=lambda memory: memory.total),
            available_memory=self._device.memory_bytes,
            time=time,
            tokens_per_second_per_gpu=tokens,
            tflops_per_gpu=tokens * self._flops / 1e12,
            mfu=tokens * self._flops / self._device.flops.get(kind, self._device.flops["bf16"]),
        )

    def search(self, world_size: int, given: Set[str], limit: int) -> list[Candidate]:
        """Return the best candidate of each layout that passes the checks of a run, at most `limit` of them."""
        found = [
            self.look_at(config, world_size)
            for config in Search(self._config, world_size, self._device, given).candidates()
        ]
        found.sort(key=_rank)
        return list(_best_of_each(found, limit, self.is_possible))

    def is_possible(self, config: RunConfig, world_size: int) -> bool:
        """Return whether a run would pass its checks on so many ranks, its teacher's included."""
        return is_possible(config, world_size) and (
            self._teacher is None or is_possible(self._teacher.taught(config), world_size)
        )


def _rank(candidate: Candidate) -> tuple[bool, float]:
    price = 1 + _PRICE_OF_MEANS * candidate.means
    return not candidate.fits, candidate.time.total * price if candidate.fits else float(candidate.memory.total)


def _best_of_each(
    found: list[Candidate], limit: int, is_possible: Callable[[RunConfig, int], bool]
) -> Iterator[Candidate]:
    """Yield the first of each combination of sizes whose configuration would run."""
    seen: set[tuple[int, ...]] = set()
    for candidate in found:
        parallel = candidate.config.parallel
        sizes = (
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            parallel.context_parallel_size,
            parallel.expert_model_parallel_size,
        )
        if sizes in seen or not is_possible(candidate.config, candidate.world_size):
            continue
        seen.add(sizes)
        yield candidate
        if len(seen) == limit:
            return


def is_possible(config: RunConfig, world_size: int) -> bool:
    """Return whether a run would pass its checks on so many ranks."""
    parallel = config.parallel
    if config.model.num_moe_experts and parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        return False  # refused when the model is built
    return not find_conflicts(config, world_size=world_size)


def plan(
    config: RunConfig,
    *,
    gpus: int,
    gpu: str | Device = "h100",
    given: Set[str] = frozenset(),
    predicted_share: float = 1.0,
    teacher: ModelConfig | None = None,
    limit: int = 12,
) -> Plan:
    """Find layouts of a run on a number of devices. Imports no torch, needs no GPU. Collective: none.

    Args:
        config: The run: its model, batch and number formats. Its layout is looked at too, as `Plan.configured`.
        gpus: Ranks, one per device.
        gpu: One of `megatron_7b.planning.NAMES`, or a device of one's own.
        given: Dotted paths of options, of those that a plan decides on, that stay as they are in `config`.
        predicted_share: How many tokens pass the output layer, for each that is read: of an objective that predicts
            only some.
        teacher: The shape of a model that the run learns from, which takes part on the same ranks.
        limit: Candidates in the plan.

    Raises:
        ConfigError: The device is unknown, the configuration is impossible at any layout, or no layout divides the
            model and the batch among so many ranks.
    """
    if gpus < 1:
        raise ConfigError(f"--gpus is {gpus}, expected at least 1")
    device = find_device(gpu, gpus) if isinstance(gpu, str) else gpu
    if config.precision.fp8 != "none" and "fp8" not in device.flops:
        raise ConfigError(
            f"precision.fp8 is {config.precision.fp8}, which {device.title} does not have",
            hint="set --precision.fp8 none --precision.fp8-param-gather False, or plan for a GPU that has it",
        )
    notes = []
    if config.model.vocab_size is None:
        config = replace(config, model=replace(config.model, vocab_size=_ASSUMED_VOCABULARY))
        notes.append(f"model.vocab_size is not set: {_ASSUMED_VOCABULARY:,} is assumed")
    check_config(_without_layout(config, given))
    planner = Planner(config, device, predicted_share=predicted_share, teacher=teacher)
    candidates = planner.search(gpus, given, limit)
    if not candidates:
        raise _no_layout(config, gpus)
    configured = planner.look_at(config, gpus) if planner.is_possible(config, gpus) else None
    return Plan(
        config=config,
        device=device,
        world_size=gpus,
        candidates=tuple(candidates),
        configured=configured,
        notes=tuple(notes),
    )


def _without_layout(config: RunConfig, given: Set[str]) -> RunConfig:
    """Return the run on one rank, with what is given: what is wrong with it is wrong at every layout."""
    plain = {
        name: value
        for name, value in vars(ParallelConfig()).items()
        if f"parallel.{name}" not in given and name != "use_distributed_optimizer"
    }
    needs_sharding = config.precision.fp8_param_gather or config.precision.optimizer_state_dtype != "fp32"
    if "parallel.use_distributed_optimizer" not in given:
        plain["use_distributed_optimizer"] = needs_sharding
    training = config.training
    if "training.micro_batch_size" not in given:
        training = replace(training, micro_batch_size=1)
    return replace(config, parallel=replace(config.parallel, **plain), training=training)


def _no_layout(config: RunConfig, gpus: int) -> ConfigError:
    """Say why so many ranks cannot share the run, and what number could."""
    batch, model = config.training.global_batch_size, config.model
    return ConfigError(
        f"--gpus {gpus}: no layout divides {model.num_layers} layers, {model.query_groups} key-value heads and a "
        f"global batch of {batch} sequences among {gpus} ranks",
        hint=f"give a number of GPUs that divides these, or --training.global-batch-size "
        f"{nearest_multiples(gpus, batch)}, multiples of {gpus}",
    )
