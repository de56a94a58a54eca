"""What a configuration must satisfy, as a flat list of small rules.

A rule names the options that it reads, so that it is left out where one of them is already known to be wrong: a typing
mistake is reported once, not once per rule that stumbles over it.
"""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import cast

from megatron_7b.config.options import get_value, options
from megatron_7b.config.problems import Problem
from megatron_7b.config.schema import RunConfig


@dataclass(frozen=True)
class Case:
    """A configuration with the number of ranks that it shall run on, where that is known."""

    config: RunConfig
    world_size: int | None

    @cached_property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model: tp * pp * cp."""
        parallel = self.config.parallel
        return (
            parallel.tensor_model_parallel_size
            * parallel.pipeline_model_parallel_size
            * parallel.context_parallel_size
        )

    @cached_property
    def data_parallel_size(self) -> int:
        """Copies of the model; 1 where the number of ranks is not known or does not fit."""
        return max((self.world_size or 0) // self.model_parallel_size, 1)

    @cached_property
    def samples_per_microbatch(self) -> int:
        """Samples that all data-parallel ranks take in together."""
        return self.config.training.micro_batch_size * self.data_parallel_size

    @cached_property
    def chunks(self) -> int:
        """Pipeline stages, virtual ones counted apart."""
        parallel = self.config.parallel
        return parallel.pipeline_model_parallel_size * (parallel.virtual_pipeline_model_parallel_size or 1)

    def problem(self, path: str, message: str) -> Problem:
        """A problem with the option at `path`, its value filled in."""
        return Problem(path, get_value(self.config, path), message)


@dataclass(frozen=True)
class Rule:
    """A check with the options that it reads."""

    reads: tuple[str, ...]
    check: Callable[[Case], Iterator[Problem]]


RULES: list[Rule] = []
DATA_RULES: list[Rule] = []
"""Rules for a run that trains: they look at the file system."""

Check = Callable[[Case], Iterator[Problem]]


def rule(*reads: str, rules: list[Rule] = RULES) -> Callable[[Check], Check]:
    """Add the decorated function to the list of rules, with the options that it reads."""

    def register(check: Check) -> Check:
        rules.append(Rule(reads, check))
        return check

    return register


def find_conflicts(
    config: RunConfig,
    *,
    world_size: int | None = None,
    require_data: bool = False,
    ignore: Collection[str] = (),
) -> list[Problem]:
    """All values out of range and all impossible combinations.

    Args:
        config: What to check.
        world_size: Number of ranks, or None where it is not known yet.
        require_data: Also apply `DATA_RULES`.
        ignore: Paths whose values are already known to be wrong; rules that read them are left out.
    """
    case = Case(config, world_size)
    problems = [problem for problem in _out_of_range(case) if not _touches((problem.path,), ignore)]
    faulty = {*ignore, *(problem.path for problem in problems)}
    for candidate in [*RULES, *(DATA_RULES if require_data else [])]:
        if not _touches(candidate.reads, faulty):
            problems.extend(candidate.check(case))
    return problems


def _touches(reads: Collection[str], faulty: Collection[str]) -> bool:
    return any(path == bad or bad.startswith(f"{path}.") for path in reads for bad in faulty)


def nearest_divisors(value: int, near: int) -> str:
    """The divisors of `value` next to `near`, below and above, as words: "2 or 4"."""
    divisors = [d for d in range(1, value + 1) if value % d == 0]
    below = [d for d in divisors if d < near][-1:]
    above = [d for d in divisors if d > near][:1]
    return " or ".join(str(d) for d in below + above)


def nearest_multiples(step: int, near: int) -> str:
    """The positive multiples of `step` next to `near`, as words: "12 or 16"."""
    below = near // step * step
    return " or ".join(str(m) for m in (below, below + step) if m > 0)


# Ranges ------------------------------------------------------------------------------------------------------------

AT_LEAST_ONE = (
    "model.num_layers",
    "model.hidden_size",
    "model.ffn_hidden_size",
    "model.num_attention_heads",
    "model.num_query_groups",
    "model.kv_channels",
    "model.vocab_size",
    "model.make_vocab_size_divisible_by",
    "model.max_position_embeddings",
    "model.rope_scaling.original_max_position_embeddings",
    "parallel.tensor_model_parallel_size",
    "parallel.pipeline_model_parallel_size",
    "parallel.virtual_pipeline_model_parallel_size",
    "parallel.context_parallel_size",
    "parallel.recompute_num_layers",
    "data.seq_length",
    "training.train_steps",
    "training.micro_batch_size",
    "training.global_batch_size",
    "training.eval_steps",
    "training.max_consecutive_nonfinite_steps",
    "telemetry.log_interval_steps",
    "runtime.num_threads",
)
NOT_NEGATIVE = (
    "model.init_method_std",
    "optimizer.min_lr",
    "optimizer.weight_decay",
    "optimizer.clip_grad",
    "optimizer.lr_warmup_steps",
    "data.num_workers",
    "training.seed",
    "training.eval_interval_steps",
    "checkpoint.save_interval_steps",
    "checkpoint.keep_last",
)
POSITIVE = (
    "model.rotary_base",
    "model.norm_epsilon",
    "model.rope_scaling.factor",
    "model.rope_scaling.low_freq_factor",
    "model.rope_scaling.high_freq_factor",
    "optimizer.lr",
    "optimizer.adam_eps",
    "optimizer.lr_decay_steps",
    "optimizer.lr_wsd_decay_steps",
    "training.exit_after_seconds",
    "runtime.distributed_timeout_minutes",
)
FRACTIONS = ("model.hidden_dropout", "model.attention_dropout", "optimizer.adam_beta1", "optimizer.adam_beta2")
MAX_SEED = 2**32 - 1
"""NumPy's limit, the tightest of the generators that are seeded."""


def _out_of_range(case: Case) -> Iterator[Problem]:
    ranges: list[tuple[tuple[str, ...], Callable[[float], bool], str]] = [
        (AT_LEAST_ONE, lambda value: value >= 1, "must be at least 1"),
        (NOT_NEGATIVE, lambda value: value >= 0, "must not be negative"),
        (POSITIVE, lambda value: value > 0, "must be above 0"),
        (FRACTIONS, lambda value: 0 <= value < 1, "must be at least 0 and below 1"),
        (("training.seed",), lambda value: value <= MAX_SEED, f"must be at most {MAX_SEED}"),
    ]
    for paths, is_allowed, message in ranges:
        for path in paths:
            value = get_value(case.config, path)
            if value is not None and not is_allowed(cast(float, value)):
                yield case.problem(path, message)


# Model -------------------------------------------------------------------------------------------------------------


@rule("model.hidden_size", "model.num_attention_heads", "model.kv_channels")
def _heads_share_the_hidden_size(case: Case) -> Iterator[Problem]:
    model = case.config.model
    if model.kv_channels is None and model.hidden_size % model.num_attention_heads:
        yield case.problem(
            "model.num_attention_heads",
            f"must divide model.hidden_size = {model.hidden_size} (nearest: "
            f"{nearest_divisors(model.hidden_size, model.num_attention_heads)}), or set model.kv_channels",
        )


@rule("model.hidden_size", "model.num_attention_heads", "model.kv_channels")
def _rotary_needs_even_heads(case: Case) -> Iterator[Problem]:
    model = case.config.model
    width = model.kv_channels or model.hidden_size // model.num_attention_heads
    if width % 2:
        path = "model.kv_channels" if model.kv_channels else "model.num_attention_heads"
        yield case.problem(path, f"heads are {width} wide; rotary embeddings turn pairs, so the width must be even")


@rule("model.num_attention_heads", "model.num_query_groups")
def _groups_divide_heads(case: Case) -> Iterator[Problem]:
    model = case.config.model
    groups = model.num_query_groups
    if groups and model.num_attention_heads % groups:
        yield case.problem(
            "model.num_query_groups",
            f"must divide model.num_attention_heads = {model.num_attention_heads}; nearest: "
            f"{nearest_divisors(model.num_attention_heads, groups)}",
        )


@rule("model.architecture", "model.add_qkv_bias", "model.qk_layernorm")
def _architecture_can_be_exported(case: Case) -> Iterator[Problem]:
    model = case.config.model
    wanted = {"qwen2": (True, False), "qwen3": (False, True)}.get(model.architecture, (False, False))
    for name, actual, needed in zip(
        ("add_qkv_bias", "qk_layernorm"), (model.add_qkv_bias, model.qk_layernorm), wanted, strict=True
    ):
        if actual != needed:
            yield case.problem(
                f"model.{name}",
                f"Hugging Face's {model.architecture} {'has' if needed else 'has no'} such weights: set {needed}, or "
                f"another model.architecture (qwen2 has add_qkv_bias, qwen3 has qk_layernorm)",
            )


@rule("model.rope_scaling")
def _rope_frequencies_are_ordered(case: Case) -> Iterator[Problem]:
    scaling = case.config.model.rope_scaling
    if scaling and scaling.low_freq_factor >= scaling.high_freq_factor:
        yield case.problem(
            "model.rope_scaling.low_freq_factor",
            f"must be below model.rope_scaling.high_freq_factor = {scaling.high_freq_factor}",
        )


@rule("data.seq_length", "model.max_position_embeddings")
def _sequence_fits_positions(case: Case) -> Iterator[Problem]:
    limit = case.config.model.max_position_embeddings
    if case.config.data.seq_length > limit:
        yield case.problem("data.seq_length", f"must be at most model.max_position_embeddings = {limit}")


# Parallel layout ---------------------------------------------------------------------------------------------------

LAYOUT = (
    "parallel.tensor_model_parallel_size",
    "parallel.pipeline_model_parallel_size",
    "parallel.context_parallel_size",
)


@rule(*LAYOUT)
def _layout_divides_ranks(case: Case) -> Iterator[Problem]:
    if case.world_size is None or case.world_size % case.model_parallel_size == 0:
        return
    parallel = case.config.parallel
    tp, pp, cp = (get_value(parallel, path.removeprefix("parallel.")) for path in LAYOUT)
    yield Problem(
        "number of ranks",
        case.world_size,
        f"must be a multiple of tp * pp * cp = {tp} * {pp} * {cp} = {case.model_parallel_size}; nearest: "
        f"{nearest_multiples(case.model_parallel_size, case.world_size)}",
    )


@rule("parallel.tensor_model_parallel_size", "model.num_attention_heads", "model.num_query_groups")
def _tensor_parallel_splits_heads(case: Case) -> Iterator[Problem]:
    model, tp = case.config.model, case.config.parallel.tensor_model_parallel_size
    groups = model.num_query_groups or model.num_attention_heads
    name = "num_query_groups" if model.num_query_groups else "num_attention_heads"
    if groups % tp:
        yield case.problem(
            "parallel.tensor_model_parallel_size",
            f"must divide model.{name} = {groups}; nearest: {nearest_divisors(groups, tp)}",
        )


@rule("parallel.tensor_model_parallel_size", "model.ffn_hidden_size")
def _tensor_parallel_splits_ffn(case: Case) -> Iterator[Problem]:
    ffn, tp = case.config.model.ffn_hidden_size, case.config.parallel.tensor_model_parallel_size
    if ffn % tp:
        yield case.problem(
            "parallel.tensor_model_parallel_size",
            f"must divide model.ffn_hidden_size = {ffn}; nearest: {nearest_divisors(ffn, tp)}",
        )


@rule("parallel.sequence_parallel", "parallel.tensor_model_parallel_size")
def _sequence_parallel_needs_tensor_parallel(case: Case) -> Iterator[Problem]:
    parallel = case.config.parallel
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        yield case.problem(
            "parallel.sequence_parallel",
            "shards activations over tensor-parallel ranks: set parallel.tensor_model_parallel_size above 1",
        )


@rule(
    "data.seq_length",
    "parallel.context_parallel_size",
    "parallel.sequence_parallel",
    "parallel.tensor_model_parallel_size",
)
def _sequence_splits_evenly(case: Case) -> Iterator[Problem]:
    parallel, seq_length = case.config.parallel, case.config.data.seq_length
    cp = parallel.context_parallel_size
    tp = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    # Context parallelism gives each rank one piece of the front half and one of the back, to even out causal work.
    pieces = (2 * cp if cp > 1 else 1) * tp
    if seq_length % pieces:
        terms = ["2 * parallel.context_parallel_size"] if cp > 1 else []
        terms += ["parallel.tensor_model_parallel_size (under sequence_parallel)"] if tp > 1 else []
        yield case.problem(
            "data.seq_length",
            f"must be a multiple of {' * '.join(terms)} = {pieces}; nearest: {nearest_multiples(pieces, seq_length)}",
        )


@rule(
    "model.num_layers", "parallel.pipeline_model_parallel_size", "parallel.virtual_pipeline_model_parallel_size"
)
def _pipeline_splits_layers(case: Case) -> Iterator[Problem]:
    layers = case.config.model.num_layers
    virtual = case.config.parallel.virtual_pipeline_model_parallel_size
    if layers % case.chunks:
        yield case.problem(
            "parallel.pipeline_model_parallel_size",
            f"{f'times virtual_pipeline_model_parallel_size = {virtual} ' if virtual else ''}"
            f"must divide model.num_layers = {layers}; "
            f"nearest{' product' if virtual else ''}: {nearest_divisors(layers, case.chunks)}",
        )


@rule("parallel.pipeline_model_parallel_size", "parallel.virtual_pipeline_model_parallel_size")
def _virtual_stages_need_a_pipeline(case: Case) -> Iterator[Problem]:
    parallel = case.config.parallel
    virtual = parallel.virtual_pipeline_model_parallel_size
    if virtual is None:
        return
    path = "parallel.virtual_pipeline_model_parallel_size"
    if virtual == 1:
        yield case.problem(path, "must be at least 2, or none for the plain schedule")
    elif parallel.pipeline_model_parallel_size == 1:
        yield case.problem(path, "needs parallel.pipeline_model_parallel_size above 1")


@rule("parallel.context_parallel_size", "model.transformer_impl", "runtime.device")
def _context_parallel_needs_transformer_engine(case: Case) -> Iterator[Problem]:
    if case.config.parallel.context_parallel_size > 1 and (obstacle := _obstacle_to_transformer_engine(case)):
        yield case.problem("parallel.context_parallel_size", f"above 1 needs Transformer Engine's attention; {obstacle}")


@rule("parallel.overlap_param_gather", "parallel.overlap_grad_reduce", "parallel.use_distributed_optimizer")
def _overlap_needs_sharded_optimizer(case: Case) -> Iterator[Problem]:
    parallel = case.config.parallel
    needed = [name for name in ("use_distributed_optimizer", "overlap_grad_reduce") if not getattr(parallel, name)]
    if parallel.overlap_param_gather and needed:
        yield case.problem(
            "parallel.overlap_param_gather", f"needs {' and '.join(f'parallel.{name} True' for name in needed)}"
        )


@rule(
    "parallel.recompute_granularity",
    "parallel.recompute_num_layers",
    "model.num_layers",
    "parallel.pipeline_model_parallel_size",
    "parallel.virtual_pipeline_model_parallel_size",
)
def _recompute_fits_a_stage(case: Case) -> Iterator[Problem]:
    parallel = case.config.parallel
    layers = case.config.model.num_layers // case.chunks
    if parallel.recompute_granularity == "full" and parallel.recompute_num_layers > max(layers, 1):
        yield case.problem("parallel.recompute_num_layers", f"must be at most {layers}, the layers of one stage")


@rule("parallel.recompute_granularity", "parallel.recompute_num_layers", "parallel.recompute_method")
def _recompute_options_are_used(case: Case) -> Iterator[Problem]:
    parallel = case.config.parallel
    for name in ("recompute_num_layers", "recompute_method"):
        default = options()[f"parallel.{name}"].default
        if parallel.recompute_granularity != "full" and getattr(parallel, name) != default:
            yield case.problem(f"parallel.{name}", "only applies with parallel.recompute_granularity full")


# Precision ---------------------------------------------------------------------------------------------------------


def _obstacle_to_transformer_engine(case: Case) -> str | None:
    if case.config.model.transformer_impl == "local":
        return "set model.transformer_impl to auto or transformer_engine"
    if case.config.runtime.device == "cpu":
        return "it has no CPU kernels: set runtime.device to auto or cuda"
    return None


@rule("model.transformer_impl", "runtime.device")
def _transformer_engine_needs_a_gpu(case: Case) -> Iterator[Problem]:
    if case.config.model.transformer_impl == "transformer_engine" and case.config.runtime.device == "cpu":
        yield case.problem("model.transformer_impl", "Transformer Engine has no CPU kernels: set auto or local")


@rule("precision.fp8", "precision.params_dtype", "model.transformer_impl", "runtime.device")
def _fp8_needs_bf16_and_transformer_engine(case: Case) -> Iterator[Problem]:
    precision = case.config.precision
    if precision.fp8 == "none":
        return
    if precision.params_dtype == "fp32":
        yield case.problem("precision.params_dtype", f"precision.fp8 {precision.fp8} works on bf16: set bf16 or auto")
    if obstacle := _obstacle_to_transformer_engine(case):
        yield case.problem("precision.fp8", f"needs Transformer Engine; {obstacle}")


@rule("precision.fp8", "precision.fp8_param_gather", "parallel.use_distributed_optimizer")
def _fp8_parameters_need_fp8_and_sharding(case: Case) -> Iterator[Problem]:
    config = case.config
    if not config.precision.fp8_param_gather:
        return
    if config.precision.fp8 == "none":
        yield case.problem("precision.fp8_param_gather", "needs precision.fp8 hybrid or e4m3")
    if not config.parallel.use_distributed_optimizer:
        yield case.problem("precision.fp8_param_gather", "needs parallel.use_distributed_optimizer True")


@rule(
    "precision.fp8",
    "precision.fp8_recipe",
    "model.hidden_size",
    "model.ffn_hidden_size",
    "parallel.tensor_model_parallel_size",
)
def _fp8_widths_fit_the_tensor_cores(case: Case) -> Iterator[Problem]:
    precision, model = case.config.precision, case.config.model
    tp = case.config.parallel.tensor_model_parallel_size
    block = 32 if precision.fp8_recipe == "mxfp8" else 16
    if precision.fp8 == "none":
        return
    for name in ("hidden_size", "ffn_hidden_size"):
        width = getattr(model, name)
        if width % (block * tp):
            yield case.problem(
                f"model.{name}",
                f"FP8 ({precision.fp8_recipe}) needs a multiple of {block} * tp = {block * tp}; nearest: "
                f"{nearest_multiples(block * tp, width)}",
            )


@rule(
    "precision.fp8",
    "data.seq_length",
    "training.micro_batch_size",
    "parallel.sequence_parallel",
    "parallel.tensor_model_parallel_size",
    "parallel.context_parallel_size",
)
def _fp8_rows_fit_the_tensor_cores(case: Case) -> Iterator[Problem]:
    config = case.config
    shards = config.parallel.context_parallel_size
    shards *= config.parallel.tensor_model_parallel_size if config.parallel.sequence_parallel else 1
    rows = config.data.seq_length * config.training.micro_batch_size
    if config.precision.fp8 != "none" and rows % (16 * shards):
        yield case.problem(
            "data.seq_length",
            f"times micro_batch_size = {rows} tokens; FP8 needs a multiple of {16 * shards} (16 per rank that shares "
            "the sequence)",
        )


@rule(
    "precision.optimizer_state_dtype", "parallel.use_distributed_optimizer", "model.transformer_impl", "runtime.device"
)
def _bf16_moments_need_the_precision_aware_optimizer(case: Case) -> Iterator[Problem]:
    path = "precision.optimizer_state_dtype"
    if case.config.precision.optimizer_state_dtype == "fp32":
        return
    if not case.config.parallel.use_distributed_optimizer:
        yield case.problem(path, "needs parallel.use_distributed_optimizer True")
    if obstacle := _obstacle_to_transformer_engine(case):
        yield case.problem(path, f"needs Transformer Engine's optimizer; {obstacle}")


# Batch and schedule ------------------------------------------------------------------------------------------------


@rule("training.global_batch_size", "training.micro_batch_size", *LAYOUT)
def _global_batch_splits_evenly(case: Case) -> Iterator[Problem]:
    batch, unit = case.config.training.global_batch_size, case.samples_per_microbatch
    if batch % unit:
        yield case.problem(
            "training.global_batch_size",
            f"must be a multiple of micro_batch_size * data-parallel ranks = {case.config.training.micro_batch_size} * "
            f"{case.data_parallel_size} = {unit}; nearest: {nearest_multiples(unit, batch)}",
        )


INTERLEAVING = (
    "training.micro_batch_size",
    "parallel.virtual_pipeline_model_parallel_size",
    *LAYOUT,
)


def _interleaving_unit(case: Case) -> int | None:
    """Samples that a global batch must be a multiple of under the interleaved schedule, else None."""
    parallel = case.config.parallel
    if (parallel.virtual_pipeline_model_parallel_size or 1) == 1:
        return None
    return case.samples_per_microbatch * parallel.pipeline_model_parallel_size


@rule("training.global_batch_size", *INTERLEAVING)
def _interleaving_fills_its_groups(case: Case) -> Iterator[Problem]:
    batch, unit = case.config.training.global_batch_size, _interleaving_unit(case)
    if unit and batch % case.samples_per_microbatch == 0 and batch % unit:
        yield case.problem(
            "training.global_batch_size",
            f"makes {batch // case.samples_per_microbatch} microbatches; the interleaved schedule needs a multiple of "
            f"pipeline_model_parallel_size = {case.config.parallel.pipeline_model_parallel_size}: "
            f"{nearest_multiples(unit, batch)} samples",
        )


@rule("training.rampup_batch_size", "training.global_batch_size", *INTERLEAVING)
def _rampup_reaches_the_global_batch(case: Case) -> Iterator[Problem]:
    training, path = case.config.training, "training.rampup_batch_size"
    if training.rampup_batch_size is None:
        return
    start, increment, samples = training.rampup_batch_size
    unit = _interleaving_unit(case) or case.samples_per_microbatch
    if min(start, increment, samples) < 1:
        yield case.problem(path, "start size, increment and samples must all be at least 1")
    elif start > training.global_batch_size:
        yield case.problem(path, f"must start below training.global_batch_size = {training.global_batch_size}")
    elif (training.global_batch_size - start) % increment:
        yield case.problem(
            path,
            f"steps of {increment} from {start} miss training.global_batch_size = {training.global_batch_size}; "
            f"nearest increment: {nearest_divisors(training.global_batch_size - start, increment)}",
        )
    elif start % unit or (increment % unit and start != training.global_batch_size):
        yield case.problem(path, f"start size and increment must be multiples of {unit} samples, as every batch must")


@rule("optimizer.lr", "optimizer.min_lr")
def _learning_rate_falls(case: Case) -> Iterator[Problem]:
    if case.config.optimizer.min_lr > case.config.optimizer.lr:
        yield case.problem("optimizer.min_lr", f"must be at most optimizer.lr = {case.config.optimizer.lr}")


@rule(
    "optimizer.lr_decay_style",
    "optimizer.lr_warmup_steps",
    "optimizer.lr_decay_steps",
    "optimizer.lr_wsd_decay_steps",
    "training.train_steps",
)
def _schedule_phases_fit(case: Case) -> Iterator[Problem]:
    optimizer, train_steps = case.config.optimizer, case.config.training.train_steps
    end = optimizer.lr_decay_steps or train_steps
    end_name = "optimizer.lr_decay_steps" if optimizer.lr_decay_steps else "training.train_steps"
    if optimizer.lr_warmup_steps >= end and optimizer.lr_warmup_steps > 0:
        yield case.problem("optimizer.lr_warmup_steps", f"must be below {end_name} = {end}")
    if optimizer.lr_wsd_decay_steps is None:
        return
    path, room = "optimizer.lr_wsd_decay_steps", end - optimizer.lr_warmup_steps
    if optimizer.lr_decay_style != "wsd":
        yield case.problem(path, f"only applies with optimizer.lr_decay_style wsd, not {optimizer.lr_decay_style}")
    elif optimizer.lr_wsd_decay_steps > room > 0:
        yield case.problem(path, f"must be at most {room}, the steps between warm-up and {end_name} = {end}")


# Data --------------------------------------------------------------------------------------------------------------


@rule("data.split", "data.valid")
def _split_is_shares(case: Case) -> Iterator[Problem]:
    try:
        shares = [float(share) for share in case.config.data.split.split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or not all(math.isfinite(share) and share >= 0 for share in shares) or not shares[0]:
        yield case.problem(
            "data.split", "expected shares of training, validation and test such as 98,2,0 or 0.95,0.05; the first > 0"
        )


def split_blend(entries: tuple[str, ...]) -> list[tuple[float, str]]:
    """Weights and prefixes of a corpus option: one prefix, or weights and prefixes in turn.

    Raises:
        ValueError: The entries are neither; the message says how.
    """
    if len(entries) == 1:
        return [(1.0, entries[0])]
    if len(entries) % 2:
        raise ValueError("expected one prefix, or weights and prefixes in turn: 0.7 A 0.3 B")
    blend = []
    for weight, prefix in zip(entries[::2], entries[1::2], strict=True):
        try:
            number = float(weight)
        except ValueError:
            raise ValueError(f"expected a weight before each prefix (0.7 A 0.3 B), not {weight!r}") from None
        if not (math.isfinite(number) and number > 0):
            raise ValueError(f"the weight of {prefix} must be above 0, not {weight}")
        blend.append((number, prefix))
    return blend


def _check_blend(case: Case, path: str) -> Iterator[Problem]:
    try:
        blend = split_blend(cast(tuple[str, ...], get_value(case.config, path)))
    except ValueError as error:
        yield case.problem(path, str(error))
        return
    for _, prefix in blend:
        if prefix.endswith((".bin", ".idx")):
            yield case.problem(path, f"give the prefix that both files share: {prefix[:-4]}")


@rule("data.train")
def _training_blend_is_well_formed(case: Case) -> Iterator[Problem]:
    yield from _check_blend(case, "data.train")


@rule("data.valid")
def _validation_blend_is_well_formed(case: Case) -> Iterator[Problem]:
    yield from _check_blend(case, "data.valid")


def _check_files(case: Case, path: str) -> Iterator[Problem]:
    entries = cast(tuple[str, ...], get_value(case.config, path))
    if not entries or list(_check_blend(case, path)):
        return
    for _, prefix in split_blend(entries):
        missing = [f"{prefix}{suffix}" for suffix in (".bin", ".idx") if not Path(f"{prefix}{suffix}").is_file()]
        if missing:
            siblings = sorted(Path(prefix).parent.glob(f"{Path(prefix).name}*.idx"))
            guess = f"; did you mean {str(siblings[0]).removesuffix('.idx')}?" if siblings else ""
            yield case.problem(path, f"no file {' nor '.join(missing)}{guess}")


@rule("data.train", rules=DATA_RULES)
def _training_needs_a_corpus(case: Case) -> Iterator[Problem]:
    if not case.config.data.train:
        yield case.problem(
            "data.train", "name the corpus: the prefix that `megatron-7b preprocess` wrote, or 0.7 A 0.3 B"
        )
    yield from _check_files(case, "data.train")


@rule("data.valid", rules=DATA_RULES)
def _validation_files_exist(case: Case) -> Iterator[Problem]:
    yield from _check_files(case, "data.valid")


@rule("data.tokenizer", rules=DATA_RULES)
def _tokenizer_exists(case: Case) -> Iterator[Problem]:
    tokenizer = case.config.data.tokenizer
    if tokenizer is not None and not Path(tokenizer).exists():
        yield case.problem("data.tokenizer", "no such file or folder")


@rule("checkpoint.initialize_from", rules=DATA_RULES)
def _initial_weights_exist(case: Case) -> Iterator[Problem]:
    source = case.config.checkpoint.initialize_from
    if source is not None and not Path(source).exists():
        yield case.problem("checkpoint.initialize_from", "no such checkpoint folder")
