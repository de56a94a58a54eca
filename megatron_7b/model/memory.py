"""What a rank surely holds of a model, as pure arithmetic. Imports no torch."""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Self

from megatron_7b.config.schema import ModelConfig, PrecisionConfig, RunConfig
from megatron_7b.model.adapter import Adapter
from megatron_7b.model.kinds import parameter_table
from megatron_7b.model.parameters import Parameter
from megatron_7b.model.sizes import padded_vocab_size
from megatron_7b.parallel import ParallelLayout

_LAYER = re.compile(r"^\w+\.layers\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class MemoryNeed:
    """Bytes that are surely held at the same time; everything else comes on top.

    Attributes:
        parameters: Working parameters.
        gradients: The buffer that gradients are accumulated in.
        optimizer: Main parameters, where the working ones are not FP32, and what the optimizer keeps for each.
        teacher: Working parameters of another model that this one learns from.
        activations: The inputs of layers for one microbatch, which even full recompute keeps.
        copies: In host memory, of what this rank writes while training continues.
        host_moments: Of the optimizer, in host memory by `optimizer.cpu_offload`; else they are part of `optimizer`.
    """

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    teacher: int = 0
    activations: int = 0
    copies: int = 0
    host_moments: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(vars(self).values())

    def __add__(self, other: Self) -> Self:
        return type(self)(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def __str__(self) -> str:
        parts = (f"{name} {gigabytes(value)}" for name, value in vars(self).items() if value)
        return f"{gigabytes(self.total)} ({', '.join(parts)})"


def _all(_row: Parameter) -> bool:
    return True


def training_need(
    config: RunConfig, layout: ParallelLayout, *, bytes_per_parameter: int, adapter: Adapter | None = None
) -> MemoryNeed:
    """Return what one rank of a training run holds.

    Args:
        config: The run; with an unknown vocabulary size, embedding and output layer count as one row each.
        layout: Position of the rank.
        bytes_per_parameter: Of the working parameters: 4 or 2.
        adapter: Added to the model; what it does not train has no gradients and no optimizer state.
    """
    precision, is_trained = config.precision, _trained_by(config.model, adapter)
    elements = count_held_parameters(config.model, layout, adapter=adapter)
    trained = count_held_parameters(config.model, layout, adapter=adapter, counts=is_trained)
    replicas = layout.dp_size * layout.cp_size if config.parallel.use_distributed_optimizer else 1
    parallel, training = config.parallel, config.training
    kept_layers = layout.layers_of(config.model.num_layers, layout.pp_rank)
    if parallel.recompute_granularity == "full" and parallel.recompute_method == "uniform":
        kept_layers //= parallel.recompute_num_layers
    tokens = training.micro_batch_size * config.data.seq_length // layout.cp_size
    if parallel.sequence_parallel:
        tokens //= layout.tp_size
    main, state = _optimizer_bytes(config, layout, adapter, bytes_per_parameter)
    is_offloaded = config.optimizer.cpu_offload
    need = MemoryNeed(
        parameters=elements * (1 if precision.fp8_param_gather else bytes_per_parameter)
        - _saved_by_four_bits(config, layout, adapter, bytes_per_parameter),
        gradients=trained * (4 if precision.grad_reduce_in_fp32 else bytes_per_parameter),
        optimizer=main if is_offloaded else main + state,
        host_moments=state if is_offloaded else 0,
        activations=tokens * config.model.hidden_size * bytes_per_parameter * kept_layers,
    )
    if not config.checkpoint.asynchronous:
        return need
    # What all replicas hold is divided among them for writing; with the distributed optimizer its state is already.
    saved, is_saved = (trained, is_trained) if adapter is not None and adapter.is_apart else (elements, _all)
    written = count_held_parameters(
        config.model,
        layout,
        with_shared=False,
        adapter=adapter,
        counts=lambda row: is_saved(row) and (row.tp_dim is not None or layout.tp_rank == 0),
    )
    whole = saved * need.parameters // elements + (main + state) * replicas
    return replace(need, copies=whole * written // max(saved, 1) // (layout.dp_size * layout.cp_size))


def inference_need(
    config: RunConfig, layout: ParallelLayout, *, bytes_per_parameter: int, adapter: Adapter | None = None
) -> MemoryNeed:
    """Return what one rank holds of a model that is only computed with; the arguments are those of `training_need`."""
    elements = count_held_parameters(config.model, layout, adapter=adapter)
    saved = _saved_by_four_bits(config, layout, adapter, bytes_per_parameter)
    return MemoryNeed(parameters=elements * bytes_per_parameter - saved)


def _saved_by_four_bits(
    config: RunConfig, layout: ParallelLayout, adapter: Adapter | None, bytes_per_parameter: int
) -> int:
    """Return the bytes that four-bit matrices of layers do not take: of 64 elements, 36 bytes are held."""
    if config.adapter.method != "qlora" or adapter is None:
        return 0
    is_trained = _trained_by(config.model, adapter)
    held = count_held_parameters(
        config.model, layout, adapter=adapter, counts=lambda row: row.is_layer_matrix and not is_trained(row)
    )
    return held * bytes_per_parameter - held * 36 // 64


def _trained_by(model: ModelConfig, adapter: Adapter | None) -> Callable[[Parameter], bool]:
    if adapter is None:
        return _all
    trained = adapter.trained_names(parameter_table(model, model.vocab_size or 1))
    return lambda row: row.name in trained


def _optimizer_bytes(
    config: RunConfig, layout: ParallelLayout, adapter: Adapter | None, bytes_per_parameter: int
) -> tuple[int, int]:
    """Return the bytes of a rank's share of main parameters, and of what the optimizer keeps beside them."""
    is_trained = _trained_by(config.model, adapter)
    main = 0 if bytes_per_parameter == 4 else 4
    if main and config.precision.optimizer_state_dtype == "bf16" and config.precision.fp8 == "none":
        main = 2  # Transformer Engine keeps of a main parameter what the working one lacks

    def whole(counts: Callable[[Parameter], bool]) -> tuple[int, int]:
        elements = count_held_parameters(config.model, layout, adapter=adapter, counts=counts)
        return elements * main, _state_bytes(config, layout, adapter, counts)

    if not config.parallel.use_distributed_optimizer:
        return whole(is_trained)
    replicas = layout.dp_size * layout.cp_size
    experts = 0, 0
    if config.model.num_moe_experts is not None:  # those of an expert are fewer
        experts = whole(lambda row: is_trained(row) and row.expert is not None)
    mains, state = (
        (of_all - of_experts) // replicas + of_experts // (replicas // layout.ep_size)
        for of_all, of_experts in zip(whole(is_trained), experts, strict=True)
    )
    return mains, state


def _state_bytes(
    config: RunConfig, layout: ParallelLayout, adapter: Adapter | None, is_trained: Callable[[Parameter], bool]
) -> int:
    """Return the bytes that the optimizer keeps beside parameters, if replicas do not share them."""
    model, optimizer = config.model, config.optimizer
    elements = count_held_parameters(model, layout, adapter=adapter, counts=is_trained)
    width = 2 if config.precision.optimizer_state_dtype == "bf16" else 4
    match optimizer.name:
        case "sgd":
            tensors = elements if optimizer.sgd_momentum else 0
        case "muon" if config.parallel.use_distributed_optimizer:  # a rank's share may be matrices alone
            tensors = elements
        case "muon":  # one tensor for what it updates itself, AdamW's two for the rest
            tensors = 2 * elements - count_held_parameters(
                model, layout, adapter=adapter, counts=lambda row: row.is_layer_matrix and is_trained(row)
            )
        case _:
            tensors = 2 * elements
    if config.adapter.method == "adalora":  # which measures the importance of every element
        tensors += 2 * elements
    return tensors * width


def count_held_parameters(
    model: ModelConfig,
    layout: ParallelLayout,
    *,
    with_shared: bool = True,
    counts: Callable[[Parameter], bool] = _all,
    adapter: Adapter | None = None,
) -> int:
    """Return the elements of all parameters that a rank holds, vocabulary padding included.

    All layers are of one size, so it is their number that counts.

    Args:
        model: Its shape.
        layout: Position of the rank.
        with_shared: Count on the last stage what it has a copy of.
        counts: Which of the parameters are counted.
        adapter: Added to the model.
    """
    vocab_size = padded_vocab_size(model.vocab_size or 1, model.make_vocab_size_divisible_by, layout.tp_size)
    table = parameter_table(model, vocab_size)
    before: list[Parameter] = []
    layers: list[Parameter] = []
    after: list[Parameter] = []
    for row in (table if adapter is None else adapter.extended(table)).values():
        part = layers if _LAYER.match(row.name) else after if layers else before  # a kind may have no layers
        part.append(row)
    if layout.pp_size > 1 and with_shared:  # the last stage has a copy of what it shares with the first
        after += [row for row in before if row.is_multiplied]
    return (
        _elements(filter(counts, layers), layout)
        * layout.layers_of(model.num_layers, layout.pp_rank)
        // model.num_layers
        + (_elements(filter(counts, before), layout) if layout.is_first_stage else 0)
        + (_elements(filter(counts, after), layout) if layout.is_last_stage else 0)
    )


def _elements(rows: Iterable[Parameter], layout: ParallelLayout) -> int:
    return sum(
        math.prod(row.shape) // (layout.tp_size if row.tp_dim is not None else 1)
        for row in rows
        if row.expert is None or row.expert % layout.ep_size == 0  # ranks that share experts have equally many
    )


def bytes_per_parameter(precision: PrecisionConfig, *, has_native_bf16: bool) -> int:
    """Return the width of the working parameters; `auto` is BF16 where the hardware multiplies it natively."""
    is_bf16 = precision.params_dtype == "bf16" or (precision.params_dtype == "auto" and has_native_bf16)
    return 2 if is_bf16 else 4


def gigabytes(number: int) -> str:
    """Spell a number of bytes: `13.5 GB`."""
    return f"{number / 1e9:,.1f} GB"
