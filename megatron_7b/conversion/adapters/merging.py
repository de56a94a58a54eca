"""The weights of a base with an adapter merged into them, in FP32, under Hugging Face's names."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from megatron_7b.adapter.low_rank.rows import scale_of
from megatron_7b.config.adapters import AdapterConfig

if TYPE_CHECKING:
    from torch import Tensor


def merged_weights(
    base: "Iterable[tuple[str, Tensor]]",
    adapter: "Mapping[str, Tensor]",
    config: AdapterConfig,
    *,
    is_transposed: bool,
) -> "Iterator[tuple[str, Tensor]]":
    """Add an adapter to the weights of its base, one tensor in memory at a time.

    Args:
        base: Name and tensor, Hugging Face's.
        adapter: Tensors by the name that a PEFT folder has them under, without its prefix; AdaLoRA's with all initial
            ranks, or with those that are left.
        config: How they are scaled.
        is_transposed: Weights with an adapter are stored as [in, out].

    Yields:
        The same names. What the adapter changes is FP32; round it only afterwards, as sums of narrow numbers lose what
        an adapter has learnt.
    """
    for name, tensor in base:
        module = name.removesuffix(".weight")
        if name in adapter:  # of modules_to_save
            yield name, adapter[name].float()
        elif (a := _first(adapter, f"{module}.lora_A")) is not None:
            b = _first(adapter, f"{module}.lora_B")
            assert b is not None
            values = _first(adapter, f"{module}.lora_E")
            magnitude = _first(adapter, f"{module}.lora_magnitude_vector")
            weight = tensor.t() if is_transposed else tensor
            merged = merged_weight(weight, a, b, config, values=values, magnitude=magnitude)
            yield name, merged.t().contiguous() if is_transposed else merged
        else:
            yield name, tensor


def merged_weight(
    weight: "Tensor",
    a: "Tensor",
    b: "Tensor",
    config: AdapterConfig,
    *,
    values: "Tensor | None" = None,
    magnitude: "Tensor | None" = None,
) -> "Tensor":
    """Return a linear layer's weight with an adapter in it.

    Args:
        weight: `[out, in]`.
        a: `[r, in]`.
        b: `[out, r]`.
        config: Gives the scale.
        values: AdaLoRA's singular values `[r, 1]`.
        magnitude: DoRA's `[out]`.

    Returns:
        FP32 `[out, in]`, computed in FP64.

    Source: PEFT 0.21, `get_delta_weight` of LoRA and AdaLoRA, and `merge` of DoRA.
    """
    a, b = a.double(), b.double()
    if values is not None:
        a = a * values.double()
    merged = weight.double() + (b @ a) * scale_of(config)
    if magnitude is not None:
        merged *= (magnitude.double() / merged.norm(dim=1)).unsqueeze(1)
    return merged.float()


def _first(adapter: "Mapping[str, Tensor]", name: str) -> "Tensor | None":
    """Return the tensor of a name, with or without the end that most of PEFT's have."""
    for spelled in (f"{name}.weight", name):
        if spelled in adapter:
            return adapter[spelled]
    return None
