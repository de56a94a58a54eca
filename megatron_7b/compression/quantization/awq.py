"""Scaling by activations: inputs that are large on text get finer steps, at the cost of those that are small.

A matrix's columns are multiplied by factors, and whatever produces its input is divided by them, which changes nothing
but the rounding: the weight of a norm, the rows of the matrix of values before the output projection, and the rows of
`up` before `down`. The factors are a power of each input's magnitude; the power is the one that loses least.

**Source:** Lin et al., "AWQ" (arXiv 2306.00978), section 3.2. What is searched is the error of the output on text,
which the sum of x x' gives exactly, where the paper runs the layer again; magnitudes are root mean squares.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_7b.compression.quantization.grid import round_to_nearest
from megatron_7b.compression.quantization.schemes import Scheme
from megatron_7b.compression.quantization.statistics import InputStatistics

_POWERS = tuple(step / 20 for step in range(21))
_SMALLEST = 1e-4


@dataclass(frozen=True)
class _Pair:
    """What produces an input, and the matrices that it is the input of."""

    producer: str
    consumers: tuple[str, ...]
    heads_sharing: int = 1
    """Neighbouring heads of the input that come from one head of the producer."""


def scale_by_activations(
    layer: nn.Module, statistics: InputStatistics, scheme: Scheme, dtype: torch.dtype, *, heads: int, groups: int
) -> None:
    """Scale a layer's matrices in place, so that rounding them to nearest loses less; its output stays the same.

    Args:
        layer: Of a decoder like Llama, in FP32.
        statistics: Of its inputs.
        scheme: What is rounded to.
        dtype: What weights of norms, and scales, are stored in.
        heads: Query heads.
        groups: Key-value heads.
    """
    modules = dict(layer.named_modules())
    for pair in _pairs(modules, heads // groups):
        consumers = {name: modules[name].weight for name in pair.consumers}
        hessian = statistics.hessian(pair.consumers[0])
        factors = _best_factors(consumers, hessian, scheme, dtype, pair.heads_sharing, heads)
        if factors is None:
            continue
        producer = modules[pair.producer]
        per_output = _of_producer(factors, pair.heads_sharing, heads)
        if isinstance(producer, nn.Linear):
            producer.weight.div_(per_output[:, None])
            if producer.bias is not None:
                producer.bias.div_(per_output)
        else:
            before = producer.weight.clone()
            producer.weight.copy_((before / factors).to(dtype))
            # what the norm has lost in rounding is given to the matrices
            factors = torch.where(producer.weight == 0, 1.0, before / producer.weight)
        for weight in consumers.values():
            weight.mul_(factors)
        _rescale(hessian, factors)


def _pairs(modules: Mapping[str, nn.Module], heads_sharing: int) -> list[_Pair]:
    pairs = [
        _Pair("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        _Pair("self_attn.v_proj", ("self_attn.o_proj",), heads_sharing),
        _Pair("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        _Pair("mlp.up_proj", ("mlp.down_proj",)),
    ]
    return [pair for pair in pairs if pair.producer in modules and all(name in modules for name in pair.consumers)]


def _best_factors(
    weights: Mapping[str, Tensor],
    hessian: Tensor,
    scheme: Scheme,
    dtype: torch.dtype,
    heads_sharing: int,
    heads: int,
) -> Tensor | None:
    """Return the factors of the inputs that lose least, [in]; None if none is better than one for all."""
    magnitudes = hessian.diagonal().clamp(min=0).sqrt()
    magnitudes = magnitudes / magnitudes.mean().clamp(min=1e-12)
    if heads_sharing > 1:  # heads that come from one head of values are scaled alike
        shared = magnitudes.view(heads // heads_sharing, heads_sharing, -1).mean(1, keepdim=True)
        magnitudes = shared.expand(-1, heads_sharing, -1).reshape(-1)
    best: tuple[float, Tensor | None] = (float("inf"), None)
    for power in _POWERS:
        factors = magnitudes.clamp(min=_SMALLEST) ** power
        factors = factors / (factors.max() * factors.min()).sqrt()
        lost = 0.0
        for weight in weights.values():
            change = round_to_nearest(weight * factors, scheme, dtype).values() / factors - weight
            lost += float((change @ hessian).mul_(change).sum(dtype=torch.float64))
        if lost < best[0]:
            best = (lost, None if power == 0 else factors)
    return best[1]


def _of_producer(factors: Tensor, heads_sharing: int, heads: int) -> Tensor:
    """Return a factor for each output of what produces the input."""
    if heads_sharing == 1:
        return factors
    return factors.view(heads // heads_sharing, heads_sharing, -1)[:, 0].reshape(-1)


def _rescale(hessian: Tensor, factors: Tensor) -> None:
    """Make the sums those of the inputs as they are now."""
    hessian /= factors[:, None]
    hessian /= factors
