"""The weights of the larger model, made one after the other from those of the smaller one."""

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from megatron_7b.conversion.growing.axes import Axis, find_axes
from megatron_7b.conversion.growing.plan import Growth
from megatron_7b.conversion.growing.widening import Widening
from megatron_7b.model.kinds import parameter_table


def grow_weights(weights: Mapping[str, Tensor], growth: Growth, vocab_size: int) -> Iterator[tuple[str, Tensor]]:
    """Make the weights of the larger model.

    Args:
        weights: Those of the smaller model by name, possibly lazy; each is read when it is needed.
        growth: What the model grows into.
        vocab_size: True vocabulary size.

    Yields:
        Name and FP32 tensor of each parameter, in the order of the forward pass.
    """
    table, axes = parameter_table(growth.source, vocab_size), find_axes(growth.source, vocab_size)
    widen = Widening(growth)
    last_norm = _last_norm(axes)
    for name in parameter_table(growth.target, vocab_size):
        origin, is_silent = growth.origin_of(name)
        if is_silent and axes[origin][0] == "written":
            shape = parameter_table(growth.target, vocab_size)[name].shape
            yield name, torch.zeros(shape)
            continue
        tensor = widen(weights[origin].float(), table[origin], axes[origin], _generator(growth.seed, name))
        yield name, tensor / widen.output_factor if origin in last_norm else tensor


def _last_norm(axes: Mapping[str, tuple[Axis, ...]]) -> frozenset[str]:
    """Return the weight and the bias of the norm that comes last before the output layer."""
    weight = [name for name, of in axes.items() if of == ("scale",)][-1]
    bias = weight.removesuffix("weight") + "bias"
    return frozenset({weight, bias})


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
