"""A plan: which layouts of a run fit on given devices, how fast each is, and what it waits for."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from typing import Literal

from megatron_7b.adapter import build_adapter
from megatron_7b.config import check_config
from megatron_7b.config.conflicts import find_conflicts
from megatron_7b.config.rule import nearest_multiples
from megatron_7b.config.schema import ModelConfig, ParallelConfig, RunConfig
from megatron_7b.errors import ConfigError
from megatron_7b.model.adapter import Adapter
from megatron_7b.model.sizes import flops_per_token
from megatron_7b.parallel import ParallelLayout
from megatron_7b.planning.candidate import Candidate
from megatron_7b.planning.counts import ModelCounts
from megatron_7b.planning.devices import GPUS, Device, find_device, this_processor
from megatron_7b.planning.layouts import Search, divisors, fullest_stages, layout_of, narrower_formats
from megatron_7b.planning.memory import RankMemory, rank_memory, working_width
from megatron_7b.planning.step_time import StepTimer
from megatron_7b.planning.teacher import Teacher

_PRICE_OF_MEANS = 0.003
"""A layout with one means more (tensor, pipeline, … parallelism) must be faster by this share to be preferred."""
_GAIN_OF_FORMATS = 0.01
"""Number formats that the run does not have must make a step shorter by this share to be shown."""
_SHOWN_WITH_FORMATS = 2
_ASSUMED_VOCABULARY = 32_000
_MOST_DEVICES = 1_000_000
_NOTHING: Mapping[str, object] = {}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What was found.

    Attributes:
        config: The run that was planned, with its vocabulary.
        device: Of each rank.
        world_size: Ranks.
        candidates: The best of each layout: those that fit first, the fastest of them first; then those that do not,
            the smallest first. Narrower number formats than the run has (`Candidate.changed`) come after those that
            fit with its own, if they are faster.
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
        self._share = predicted_share
        self._counts = ModelCounts(config.model, build_adapter(config))
        self._timer = StepTimer(self._counts, device, predicted_share=predicted_share)
        self._flops = flops_per_token(
            config.model, config.data.seq_length, predicted_share=predicted_share, is_frozen=config.adapter.is_used
        )
        self._head_layers = self._timer.head_layers(config)

    def look_at(self, config: RunConfig, world_size: int, changed: Mapping[str, object] = _NOTHING) -> Candidate:
        """Return what one layout of the run takes, whether or not it may run; `changed` is that of the candidate."""
        last = layout_of(config, world_size, config.parallel.pipeline_model_parallel_size - 1)
        stages = [
            dataclasses.replace(last, rank=stage * (world_size // last.pp_size))
            for stage in fullest_stages(last, config.model.num_layers)
        ]
        memories = [
            rank_memory(config, self._counts, layout, self._device, predicted_share=self._share) for layout in stages
        ]
        time = self._timer.step_time(config, last)
        if self._teacher is not None:
            memories = [
                self._teacher.add_memory(memory, config, layout)
                for memory, layout in zip(memories, stages, strict=True)
            ]
            time = self._teacher.add_time(time, config, last)
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
            changed=changed,
        )

    def search(self, world_size: int, given: Set[str], limit: int) -> list[Candidate]:
        """Return the best candidate of each layout that passes the checks of a run, at most `limit` of them."""
        own = self._best_of(self._config, world_size, given, limit)
        changes = tuple(narrower_formats(self._config, self._device, given))
        of_changes = [
            candidate
            for changed in changes
            for candidate in self._best_of(_with(self._config, changed), world_size, given, limit, changed)
        ]
        of_changes.sort(key=_rank)
        fitting = [candidate for candidate in own if candidate.fits]
        if not fitting and not any(candidate.fits for candidate in of_changes):
            return sorted([*own, *of_changes], key=_rank)[:limit]
        slowest = fitting[0].time.total * (1 - _GAIN_OF_FORMATS) if fitting else math.inf
        faster = [candidate for candidate in of_changes if candidate.fits and candidate.time.total < slowest]
        if fitting:
            faster = faster[: min(_SHOWN_WITH_FORMATS, limit - 1)]
        kept = fitting[: limit - len(faster)]
        return [*kept, *faster, *(candidate for candidate in own if not candidate.fits)][:limit]

    def _best_of(
        self,
        config: RunConfig,
        world_size: int,
        given: Set[str],
        limit: int,
        changed: Mapping[str, object] = _NOTHING,
    ) -> list[Candidate]:
        found: list[Candidate] = []
        too_large: set[ParallelConfig] = set()
        for by_recompute in Search(config, world_size, self._device, given, self._head_layers).layouts():
            fastest, *others = by_recompute
            if fastest.parallel in too_large:  # with fewer sequences at once
                continue
            first = self.look_at(fastest, world_size, changed)
            found.append(first)
            if first.fits or not others:
                continue
            smallest = self.look_at(others[-1], world_size, changed)
            found.append(smallest)
            if not smallest.fits:
                too_large.add(fastest.parallel)
                continue
            for one in others[:-1]:
                found.append(candidate := self.look_at(one, world_size, changed))
                if candidate.fits:  # what recomputes more is slower
                    break
        found.sort(key=_rank)
        return list(_best_of_each(found, limit, self.is_possible))

    def is_possible(self, config: RunConfig, world_size: int) -> bool:
        """Return whether a run would pass its checks on so many ranks, its teacher's included."""
        return is_possible(config, world_size) and (
            self._teacher is None or is_possible(self._teacher.taught(config), world_size)
        )


def _with(config: RunConfig, changed: Mapping[str, object]) -> RunConfig:
    """Return the run with other number formats."""
    names = {path.removeprefix("precision."): value for path, value in changed.items()}
    return replace(config, precision=replace(config.precision, **names))  # type: ignore[arg-type]


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
    if not 1 <= gpus <= _MOST_DEVICES:
        raise ConfigError(f"--gpus is {gpus}, expected at least 1 and at most {_MOST_DEVICES:,}")
    device = find_device(gpu, gpus) if isinstance(gpu, str) else gpu
    if config.precision.fp8 != "none" and "fp8" not in device.flops:
        raise ConfigError(
            f"precision.fp8 is {config.precision.fp8}, which {device.title} does not have",
            hint="set --precision.fp8 none --precision.fp8-param-gather False, or plan for a GPU that has it",
        )
    notes = []
    if gpus > device.node_size and gpus % device.node_size:
        whole = max(size for size in divisors(gpus) if size <= device.node_size)
        notes.append(
            f"{gpus} GPUs do not fill nodes of {device.node_size}: {gpus // whole} nodes with {whole} are assumed"
        )
        device = replace(device, node_size=whole)
    if config.model.vocab_size is None:
        config = replace(config, model=replace(config.model, vocab_size=_ASSUMED_VOCABULARY))
        notes.append(f"model.vocab_size is not set: {_ASSUMED_VOCABULARY:,} is assumed")
    if config.runtime.device == "cpu" and device.type == "cuda":
        notes.append("runtime.device is cpu: such a run uses no GPU; --gpu cpu plans for this machine's processor")
    check_config(_without_layout(config, given))
    planner = Planner(config, device, predicted_share=predicted_share, teacher=teacher)
    candidates = planner.search(gpus, given, limit)
    if not candidates:
        raise _no_layout(config, gpus, given)
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
    if "parallel.pipeline_model_parallel_size" not in given:
        plain["pipeline_model_parallel_layout"] = ()
    training = config.training
    if "training.micro_batch_size" not in given:
        training = replace(training, micro_batch_size=1)
    return replace(config, parallel=replace(config.parallel, **plain), training=training)


def _no_layout(config: RunConfig, gpus: int, given: Set[str]) -> ConfigError:
    """Say why so many ranks cannot share the run, and what number could."""
    batch, model, parallel = config.training.global_batch_size, config.model, config.parallel
    sizes = [f"parallel.{kind}_model_parallel_size" for kind in ("tensor", "pipeline")]
    fixed = {path: int(getattr(parallel, path.removeprefix("parallel."))) for path in sizes if path in given}
    if gpus % (replica := math.prod(fixed.values())):
        return ConfigError(
            f"--gpus {gpus}: no layout divides it with {' and '.join(f'{path} = {n}' for path, n in fixed.items())}",
            hint=f"--gpus {nearest_multiples(replica, gpus)}, or leave the layout to the plan",
        )
    has_stages = model.traits.kind != "encoder_decoder"
    return ConfigError(
        f"--gpus {gpus}: no layout divides {f'{model.num_layers} layers, ' if has_stages else ''}"
        f"{model.query_groups} key-value heads and a global batch of {batch} sequences among {gpus} ranks",
        hint=f"give a number of GPUs that divides these, or a batch that is a multiple of it: "
        f"--training.global-batch-size {nearest_multiples(gpus, batch)}"
        if batch % gpus
        else "give a number of GPUs that divides these",
    )


def expected_memory(
    config: RunConfig,
    layout: ParallelLayout,
    *,
    device_type: Literal["cuda", "cpu"],
    width: int,
    adapter: Adapter | None = None,
    predicted_share: float = 1.0,
) -> RankMemory:
    """Return what a rank of a run is expected to hold at its peak, without a teacher. Collective: none.

    Args:
        config: The run; the vocabulary's size is known.
        layout: Position of the rank.
        device_type: What it computes on.
        width: Bytes of a working parameter.
        adapter: Added to the model.
        predicted_share: How many tokens pass the output layer, for each that is read.
    """
    precision = replace(config.precision, params_dtype="bf16" if width == 2 else "fp32")
    device = next(iter(GPUS.values())) if device_type == "cuda" else this_processor(1, memory=0)
    counts = ModelCounts(config.model, adapter)
    return rank_memory(replace(config, precision=precision), counts, layout, device, predicted_share=predicted_share)
