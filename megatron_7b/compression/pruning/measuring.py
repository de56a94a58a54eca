"""Scores of layers, heads, neurons and channels from what passes through a model, on all its ranks.

Source: layers by how much they turn the residual stream: Men et al. 2024, "ShortGPT" (arXiv 2403.03853), equation 1;
Gromov et al. 2024, "The Unreasonable Ineffectiveness of the Deeper Layers" (arXiv 2403.17887), section 3, there of the
last token, here the mean over all. By the loss without them: Kim et al. 2024, "Shortened LLaMA" (arXiv 2402.02834).
Heads, neurons and channels: Muralidharan et al. 2024, "Minitron" (arXiv 2407.14679), section 2.2, with the aggregation
that is best there: the mean of the magnitude over a sequence, then the root of the sum of squares over sequences.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from megatron_7b.compression.pruning.samples import TextSamples
from megatron_7b.compression.pruning.scores import Scores
from megatron_7b.compression.pruning.weights import stream_norms
from megatron_7b.model.kinds import kind_of
from megatron_7b.model.on_ranks import ModelOnRanks
from megatron_7b.objective.causal import CausalLanguageModeling
from megatron_7b.objective.microbatches import run_microbatches
from megatron_7b.parallel.groups import broadcast_from_last_stage, process_groups, sum_over_replicas

type Progress = Callable[[int, int], None]
"""Takes how much is done, and of how much."""

_TOKENS_AT_ONCE = 256
"""Of which the angles between all layers are computed together."""


@torch.inference_mode()
def measure_scores(
    model: ModelOnRanks, samples: TextSamples, *, with_depth: bool = True, on_progress: Progress | None = None
) -> Scores:
    """Send calibration text through a model, and return what it shows.

    Args:
        model: A loaded decoder.
        samples: The text.
        with_depth: Compare the residual stream before all layers as well; otherwise these distances are zero.
        on_progress: Called after every round, on every rank.

    Returns:
        The same on all ranks, and at every layout, up to rounding.

    Collective: all ranks.
    """
    recorder = _Recorder(model, with_depth=with_depth)
    with recorder.watching():
        loss = _mean_loss(model, samples, recorder, on_progress)
    return recorder.scores(loss, samples)


@torch.inference_mode()
def measure_loss_of(model: ModelOnRanks, samples: TextSamples, on_progress: Progress | None = None) -> float:
    """Return the mean loss of text, nats per token; the same on all ranks. Collective: all ranks."""
    return _mean_loss(model, samples, None, on_progress)


@torch.inference_mode()
def measure_without(
    model: ModelOnRanks,
    samples: TextSamples,
    candidates: Sequence[tuple[int, ...]],
    on_progress: Progress | None = None,
) -> dict[tuple[int, ...], float]:
    """Return the loss of text without layers, by these; the same on all ranks.

    Args:
        model: A loaded decoder.
        samples: The text.
        candidates: Layers that are left out together.
        on_progress: Called after every candidate, on every rank.

    Collective: all ranks.
    """
    losses = {}
    for number, layers in enumerate(candidates, start=1):
        with _skipping(model, frozenset(layers)):
            losses[layers] = _mean_loss(model, samples, None, None)
        if on_progress is not None:
            on_progress(number, len(candidates))
    return losses


def _mean_loss(
    model: ModelOnRanks, samples: TextSamples, recorder: "_Recorder | None", on_progress: Progress | None
) -> float:
    if recorder is None:
        return run_text(model, samples, on_progress=on_progress)
    return run_text(model, samples, recorder.begin_round, recorder.end_round, on_progress)


def run_text(
    model: ModelOnRanks,
    samples: TextSamples,
    begin_round: Callable[[list[Tensor]], None] = lambda _: None,
    end_round: Callable[[], None] = lambda: None,
    on_progress: Progress | None = None,
) -> float:
    """Send text through a model, a microbatch per pipeline stage at a time, and return its mean loss.

    Args:
        model: A loaded decoder.
        samples: The text.
        begin_round: Called before each round; takes for each microbatch which of its rows count, [b], 1 or 0.
        end_round: Called after it.
        on_progress: Called then, too.

    Collective: all ranks.
    """
    objective, layout = CausalLanguageModeling(model.config), model.layout
    shape = (layout.pp_size, layout.dp_size, model.config.training.micro_batch_size)
    size = int(np.prod(shape))
    totals = torch.zeros(2, dtype=torch.float64, device=model.device)
    for first in range(0, samples.num_samples, size):
        indices = np.arange(first, first + size).reshape(shape)[:, layout.dp_rank]
        is_counted = indices < samples.num_samples
        begin_round([torch.from_numpy(row).to(model.device, torch.float64) for row in is_counted])
        totals += run_microbatches(
            model.chunks,
            [samples.batch(rows).counting(counted) for rows, counted in zip(indices, is_counted, strict=True)],
            objective,
            layout=layout,
            device=model.device,
            forward_only=True,
        )[0]
        end_round()
        if on_progress is not None:
            on_progress(min(first + size, samples.num_samples), samples.num_samples)
    loss_sum, num_tokens = broadcast_from_last_stage(sum_over_replicas(totals)).tolist()
    return float(loss_sum / num_tokens)


def symbols(model: ModelOnRanks) -> Iterator[tuple[int, Any]]:
    """Yield megatron-core's layers of this rank with their numbers in the whole model, from 0; MLPs are odd."""
    for chunk in model.chunks:
        for layer in chunk.decoder.layers:
            yield layer.layer_number - 1, layer


@contextlib.contextmanager
def _skipping(model: ModelOnRanks, layers: frozenset[int]) -> Iterator[None]:
    """Have layers return what they are given, for the duration of a with block."""
    per_layer = kind_of(model.config.model).core_layers_per_layer
    skipped = [module for symbol, module in symbols(model) if symbol // per_layer in layers]
    for module in skipped:
        module.forward = lambda hidden_states, **_: (hidden_states, None)
    try:
        yield
    finally:
        for module in skipped:
            del module.forward


class _Recorder:
    """Sums over what passes through this rank's layers.

    Every sum is of what this rank alone has, or has to contribute, so that adding up all ranks gives the whole.
    """

    def __init__(self, model: ModelOnRanks, *, with_depth: bool) -> None:
        shape, config = model.config.model, model.config.parallel
        self._model, self._shape, self._layout, self._with_depth = model, shape, model.layout, with_depth
        self._is_divided = config.sequence_parallel and model.layout.tp_size > 1
        groups = process_groups()
        self._tp_group, self._pp_group = groups.tp, groups.pp
        layers = shape.num_layers

        def zeros(*sizes: int) -> Tensor:
            return torch.zeros(*sizes, dtype=torch.float64, device=model.device)

        self._cosines, self._angles = zeros(layers + 1, layers + 1), zeros(layers + 1, layers + 1)
        self._units, self._heads = zeros(layers, shape.ffn_hidden_size), zeros(layers, shape.num_attention_heads)
        self._channels, self._energies = zeros(shape.hidden_size), zeros(2 * layers + 1, shape.hidden_size)
        self._counted: list[Tensor] = []
        self._passes: dict[tuple[int, str], int] = {}
        self._states: dict[int, list[Tensor]] = {}
        self._norms = stream_norms_of(model)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Look at what passes through, for the duration of a with block."""
        hooks = []
        for symbol, layer in symbols(self._model):
            hooks.append(
                layer.register_forward_pre_hook(
                    lambda _, inputs, named, symbol=symbol: self._see_stream(symbol, hidden_of(inputs, named)),
                    with_kwargs=True,
                )
            )
            see, linear = (
                (self._see_units, layer.mlp.linear_fc2)
                if symbol % 2
                else (self._see_heads, layer.self_attention.linear_proj)
            )
            hooks.append(
                linear.register_forward_pre_hook(lambda _, inputs, symbol=symbol, see=see: see(symbol, inputs[0]))
            )
        last = self._model.chunks[-1]
        if last.post_process:
            symbol = 2 * self._shape.num_layers
            hooks.append(
                last.decoder.final_norm.register_forward_pre_hook(lambda _, inputs: self._see_stream(symbol, inputs[0]))
            )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def begin_round(self, counted: list[Tensor]) -> None:
        """Begin with new microbatches; of each, [b], 1 for the rows that count and 0 for the others."""
        self._counted, self._passes, self._states = counted, {}, {}

    def end_round(self) -> None:
        """Compare the residual stream of all stages."""
        if not self._with_depth:
            return
        for microbatch, counted in enumerate(self._counted):
            own = torch.stack([self._states[symbol][microbatch] for symbol in sorted(self._states)])
            states = self._gathered_stages(own)  # [layers + 1, s, b, h]
            tokens = states[:, :, counted.bool()].flatten(1, 2).transpose(0, 1)
            self._compare(tokens)
        self._states = {}

    def _gathered_stages(self, own: Tensor) -> Tensor:
        """Put the states of all stages together; the last stage has one more."""
        if self._layout.pp_size == 1:
            return own
        layers = [self._layout.layers_of(self._shape.num_layers, stage) for stage in range(self._layout.pp_size)]
        padding = own[-1:].expand(max(layers) + 1 - len(own), *own.shape[1:])
        padded = torch.cat([own, padding]).contiguous()
        parts = [torch.empty_like(padded) for _ in layers]
        dist.all_gather(parts, padded, group=self._pp_group)
        layers[-1] += 1
        return torch.cat([part[:number] for part, number in zip(parts, layers, strict=True)])

    def _compare(self, tokens: Tensor) -> None:
        """Add up the cosines and angles between all layers of [t, layers + 1, h]; ranks share equal tokens out."""
        layout = self._layout
        sharers, number = layout.pp_size, layout.pp_rank
        if not self._is_divided:
            sharers, number = sharers * layout.tp_size, number * layout.tp_size + layout.tp_rank
        for part in torch.split(tokens[number::sharers], _TOKENS_AT_ONCE):
            directions = functional.normalize(part.float(), dim=-1)
            cosines = (directions @ directions.transpose(1, 2)).clamp(-1.0, 1.0)
            self._cosines += (1.0 - cosines).sum(0, dtype=torch.float64)
            self._angles += cosines.arccos().sum(0, dtype=torch.float64) / torch.pi

    def _row_weights(self, symbol: int, kind: str) -> Tensor:
        """Return which rows count of the microbatch that passes through now."""
        number = self._passes.get((symbol, kind), 0)
        self._passes[symbol, kind] = number + 1
        return self._counted[number]

    def _see_stream(self, symbol: int, hidden: Tensor) -> None:
        """Look at [s, b, h] before the norm of a symbol; [s/tp, b, h] under sequence parallelism."""
        counted = self._row_weights(symbol, "stream")
        if self._with_depth and symbol % 2 == 0:
            self._states.setdefault(symbol, []).append(hidden.detach().clone())
        is_own = self._is_divided or self._layout.tp_rank == 0
        centred = hidden.float() if self._norms[symbol].is_rms else _centred(hidden.float())
        if is_own:
            self._energies[symbol] += (centred.square().sum(0, dtype=torch.float64) * counted[:, None]).sum(0)
        if symbol == 2 * self._shape.num_layers:
            return
        means = self._norms[symbol](hidden).abs().sum(0, dtype=torch.float64)
        if self._is_divided:
            dist.all_reduce(means, group=self._tp_group)
        length = hidden.shape[0] * (self._layout.tp_size if self._is_divided else 1)
        if self._layout.tp_rank == 0:
            self._channels += ((means / length).square() * counted[:, None]).sum(0)

    def _see_units(self, symbol: int, inputs: Tensor) -> None:
        """Look at [s, b, f/tp], the outputs of neurons."""
        means = inputs.float().abs().mean(0).double()
        self._own(self._units[symbol // 2]).add_((means.square() * self._row_weights(symbol, "units")[:, None]).sum(0))

    def _see_heads(self, symbol: int, inputs: Tensor) -> None:
        """Look at [s, b, n/tp × d], the outputs of heads."""
        heads = inputs.float().reshape(*inputs.shape[:-1], -1, self._shape.head_width)
        norms = torch.linalg.vector_norm(heads, dim=-1).mean(0).double()
        self._own(self._heads[symbol // 2]).add_((norms.square() * self._row_weights(symbol, "heads")[:, None]).sum(0))

    def _own(self, whole: Tensor) -> Tensor:
        """Return this tensor rank's part of the scores of a layer."""
        return whole.chunk(self._layout.tp_size)[self._layout.tp_rank]

    def scores(self, loss: float, samples: TextSamples) -> Scores:
        """Add up all ranks. Collective: all ranks."""
        num_tokens = samples.num_samples * samples.seq_length
        found = (self._cosines, self._angles, self._units, self._heads, self._channels, self._energies)
        for sums in found:
            dist.all_reduce(sums)
        cosines, angles, units, heads, channels, energies = (sums.cpu().numpy() for sums in found)
        return Scores(
            loss=loss,
            cosine_distances=cosines / num_tokens,
            angular_distances=angles / num_tokens,
            units=np.sqrt(units),
            heads=np.sqrt(heads),
            channels=np.sqrt(channels),
            energies=energies / num_tokens,
        )


class _Norm:
    """A norm, computed here: Transformer Engine fuses it with the linear layer after it, and nobody sees its result."""

    def __init__(self, weight: Tensor, bias: Tensor | None, epsilon: float, *, is_rms: bool) -> None:
        self._weight, self._bias, self._epsilon, self.is_rms = weight, bias, epsilon, is_rms

    def __call__(self, hidden: Tensor) -> Tensor:
        size, weight = hidden.shape[-1:], self._weight.float()
        if self.is_rms:
            return functional.rms_norm(hidden.float(), size, weight, self._epsilon)
        bias = None if self._bias is None else self._bias.float()
        return functional.layer_norm(hidden.float(), size, weight, bias, self._epsilon)


def stream_norms_of(model: ModelOnRanks) -> dict[int, _Norm]:
    """Return this rank's norms by the number of the symbol that they come before."""
    shape = model.config.model
    own: dict[str, Tensor] = {}
    for chunk in model.chunks:
        for core_name, parameter in chunk.named_core_parameters():
            own[chunk.table.by_core_name(core_name).name] = parameter.detach()
    is_rms = shape.traits.normalization == "RMSNorm"
    return {
        symbol: _Norm(own[name], own.get(name.removesuffix("weight") + "bias"), shape.norm_epsilon, is_rms=is_rms)
        for symbol, name in enumerate(stream_norms(shape))
        if name in own
    }


def hidden_of(inputs: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    """Return the hidden states among the arguments of a layer."""
    hidden: Tensor = inputs[0] if inputs else named["hidden_states"]
    return hidden


def _centred(hidden: Tensor) -> Tensor:
    return hidden - hidden.mean(-1, keepdim=True)
