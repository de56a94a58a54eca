"""Sums of x x' over the inputs of a model's matrices, on all its ranks."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_7b.compression.pruning.measuring import Progress, hidden_of, run_text, stream_norms_of, symbols
from megatron_7b.compression.pruning.samples import TextSamples
from megatron_7b.model.on_ranks import ModelOnRanks
from megatron_7b.parallel.groups import process_groups

MATRICES = (
    ("self_attention.linear_qkv", "self_attention.linear_proj"),
    ("mlp.linear_fc1", "mlp.linear_fc2"),
)
"""Of an attention and of an MLP: the matrix after the norm, and the one that writes into the residual stream."""


@torch.inference_mode()
def measure_inputs(
    model: ModelOnRanks, samples: TextSamples, layers: Sequence[int], on_progress: Progress | None = None
) -> dict[str, Tensor]:
    """Return the Gram matrices of the inputs of all matrices of some layers, FP32 [in, in], by the matrices' names.

    Args:
        model: A loaded decoder.
        samples: The text.
        layers: Which layers; their sums are in the memory of every rank.
        on_progress: Called after every round, on every rank.

    Returns:
        The same on all ranks, and at every layout, up to rounding.

    Collective: all ranks.
    """
    shape, device = model.config.model, model.device
    widths = (
        (shape.hidden_size, shape.num_attention_heads * shape.head_width),
        (shape.hidden_size, shape.ffn_hidden_size),
    )
    table = model.chunks[0].table
    sums: dict[tuple[int, int], Tensor] = {}
    names: dict[tuple[int, int], str] = {}
    for symbol in (symbol for layer in layers for symbol in (2 * layer, 2 * layer + 1)):
        for place, matrix in enumerate(MATRICES[symbol % 2]):
            width = widths[symbol % 2][place]
            sums[symbol, place] = torch.zeros(width, width, device=device)
            names[symbol, place] = table.by_core_name(f"decoder.layers.{symbol}.{matrix}.weight").name
    watch = _Inputs(model, sums)
    hooks = [hook for symbol, layer in symbols(model) if (symbol, 0) in sums for hook in watch.hooks(symbol, layer)]
    try:
        run_text(model, samples, watch.begin_round, on_progress=on_progress)
    finally:
        for hook in hooks:
            hook.remove()
    for own in sums.values():
        dist.all_reduce(own)
    return {names[key]: own for key, own in sums.items()}


class _Inputs:
    """Adds up what this rank has to contribute."""

    def __init__(self, model: ModelOnRanks, sums: dict[tuple[int, int], Tensor]) -> None:
        self._sums, self._layout, self._group = sums, model.layout, process_groups().tp
        self._is_divided = model.config.parallel.sequence_parallel and model.layout.tp_size > 1
        self._norms = stream_norms_of(model)
        self._counted: list[Tensor] = []
        self._passes: dict[tuple[int, int], int] = {}

    def begin_round(self, counted: list[Tensor]) -> None:
        """Begin with new microbatches; of each, [b], 1 for the rows that count and 0 for the others."""
        self._counted, self._passes = counted, {}

    def hooks(self, symbol: int, layer: Any) -> list[Any]:
        """Look at a layer; returns what `remove` ends it with."""
        linear = layer.mlp.linear_fc2 if symbol % 2 else layer.self_attention.linear_proj
        return [
            layer.register_forward_pre_hook(self._of_stream(symbol), with_kwargs=True),
            linear.register_forward_pre_hook(lambda _, inputs: self._see_sharded(symbol, inputs[0])),
        ]

    def _of_stream(self, symbol: int) -> Callable[..., None]:
        def see(_: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            self._add(symbol, 0, self._norms[symbol](hidden_of(inputs, named)), is_own=self._is_divided)

        return see

    def _see_sharded(self, symbol: int, inputs: Tensor) -> None:
        """Look at [s, b, in/tp]."""
        if self._layout.tp_size > 1:
            parts = [torch.empty_like(inputs) for _ in range(self._layout.tp_size)]
            dist.all_gather(parts, inputs.contiguous(), group=self._group)
            inputs = torch.cat(parts, dim=-1)
        self._add(symbol, 1, inputs, is_own=False)

    def _add(self, symbol: int, place: int, inputs: Tensor, *, is_own: bool) -> None:
        number = self._passes.get((symbol, place), 0)
        self._passes[symbol, place] = number + 1
        if not is_own and self._layout.tp_rank:
            return
        counted = self._counted[number].to(torch.float32)
        flat = (inputs.float() * counted[None, :, None]).flatten(0, 1)
        self._sums[symbol, place].addmm_(flat.T, flat)
