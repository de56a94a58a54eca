"""Builds this rank's part of a model, of whichever kind."""

import itertools
import logging
from collections.abc import Iterator
from dataclasses import replace

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_7b.config.schema import ModelConfig, RunConfig
from megatron_7b.model.adapter import Adapter
from megatron_7b.model.core_config import build_transformer_config
from megatron_7b.model.initialization import fill_shard, initial_shard
from megatron_7b.model.kernels import resolve_transformer_impl, select_kernels
from megatron_7b.model.kinds import kind_of, parameter_table
from megatron_7b.model.kinds.chunk import ModelChunk
from megatron_7b.model.kinds.kind import ChunkPlan
from megatron_7b.model.parameters import Parameter, ParameterTable
from megatron_7b.model.sizes import padded_vocab_size
from megatron_7b.parallel import ParallelLayout
from megatron_7b.runtime.machine.device import DeviceType

logger = logging.getLogger(__name__)

_PREDICTING = ("output_layer.", "lm_head.", "lm_norm.", "pooler.", "binary_head.")
"""Beginnings of the names of parameters that only predictions of tokens or pairs need."""


def build_model(
    config: RunConfig,
    *,
    vocab_size: int,
    layout: ParallelLayout,
    groups: ProcessGroupCollection,
    device_type: DeviceType,
    initialize: bool = True,
    adapter: Adapter | None = None,
) -> list[ModelChunk]:
    """Build this rank's model chunks on its device.

    Args:
        config: The run.
        vocab_size: True vocabulary size.
        layout: Position of this rank.
        groups: megatron-core's process groups.
        device_type: Where to compute.
        initialize: Fill the parameters from the seed; otherwise they are undefined until weights are loaded.
        adapter: Added to the model; what it does not train needs no gradient.

    Returns:
        One chunk per virtual pipeline stage (one without interleaving).

    Collective: the embedding group, where the embedding is tied and there is more than one stage.

    Raises:
        ConfigError: Transformer Engine was requested and cannot be used.
    """
    impl, reason = resolve_transformer_impl(config, device_type)
    if layout.is_main:
        # On a GPU it decides about the speed; a CPU has no choice.
        logger.log(logging.INFO if device_type == "cuda" else logging.DEBUG, "layers: %s (%s)", impl, reason)
    kind = kind_of(config.model)
    core_config = build_transformer_config(
        config, device_type=device_type, impl=impl, core_layers_per_layer=kind.core_layers_per_layer
    )
    padded = padded_vocab_size(vocab_size, config.model.make_vocab_size_divisible_by, layout.tp_size)
    kernels, table = select_kernels(impl, config.model.traits), parameter_table(config.model, padded)
    plan = ChunkPlan(
        config=config,
        core_config=core_config,
        impl=impl,
        kernels=kernels if adapter is None else adapter.kernels(kernels),
        table=table if adapter is None else adapter.extended(table),
        vocab_size=vocab_size,
        padded_vocab_size=padded,
        layout=layout,
        groups=groups,
        stage=0,
    )
    chunks = [kind.build_chunk(replace(plan, stage=stage)) for stage in range(layout.num_chunks)]
    if adapter is not None:
        for chunk in chunks:
            adapter.attach(chunk, table)
    if device_type == "cuda":
        chunks = [chunk.cuda() for chunk in chunks]
    if adapter is not None and not adapter.keeps_training:
        _freeze(chunks, adapter, table)
    if config.objective_name == "embedding":
        _leave_output_layer(chunks)
    if initialize:
        initialize_parameters(chunks, config.model, seed=config.training.seed, layout=layout, vocab_size=vocab_size)
    return chunks


def _freeze(chunks: list[ModelChunk], adapter: Adapter, base: ParameterTable) -> None:
    """Let only what an adapter adds, or wants, be trained."""
    trained = adapter.trained_names(base)
    for description, parameter in itertools.chain.from_iterable(map(described_parameters, chunks)):
        parameter.requires_grad_(description.name in trained)
    for chunk in chunks:
        embedding = getattr(chunk, "embedding", None)
        if embedding is not None and chunk.config.recompute_granularity == "full":
            embedding.register_forward_hook(_want_gradient)


def _want_gradient(_module: torch.nn.Module, _inputs: object, output: Tensor) -> None:
    """Let recomputed layers behind a frozen embedding have gradients: they give none if their inputs want none."""
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_()


def _leave_output_layer(chunks: list[ModelChunk]) -> None:
    """Keep what predicts tokens as it came with the weights, without decay: nothing is learned from its output."""
    for description, parameter in itertools.chain.from_iterable(map(described_parameters, chunks)):
        if description.name.startswith(_PREDICTING):
            parameter.requires_grad_(False)


def described_parameters(chunk: ModelChunk) -> Iterator[tuple[Parameter, torch.nn.Parameter]]:
    """Yield the parameters of a model chunk, each with the whole one that it is a part of."""
    for name, parameter in chunk.named_core_parameters():
        yield chunk.table.by_core_name(name), parameter


def named_canonical_parameters(chunks: list[ModelChunk]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield this rank's parameters under their layout-independent names."""
    for chunk in chunks:
        for description, parameter in described_parameters(chunk):
            yield description.name, parameter


def initialize_parameters(
    chunks: list[ModelChunk], model: ModelConfig, *, seed: int, layout: ParallelLayout, vocab_size: int
) -> None:
    """Fill every parameter of this rank from the seed and its name. Collective: none."""
    of_this_rank = {"seed": seed, "tp_rank": layout.tp_rank, "tp_size": layout.tp_size, "vocab_size": vocab_size}
    with torch.no_grad():
        for description, parameter in itertools.chain.from_iterable(map(described_parameters, chunks)):
            if hasattr(parameter, "take_values"):  # it is held in another form
                parameter.take_values(initial_shard(description, model=model, **of_this_rank))
            elif hasattr(parameter, "get_high_precision_init_val"):
                # An FP8 parameter: the optimizer takes its FP32 copy from what Transformer Engine keeps beside it.
                values = initial_shard(description, model=model, **of_this_rank)
                parameter.copy_(values)
                parameter.get_high_precision_init_val().copy_(values)
            else:
                fill_shard(parameter, description, model=model, **of_this_rank)
