"""Linear layers whose frozen weights are held in four bits (NF4), as QLoRA has them.

A weight is quantised when it arrives, from a checkpoint or an initial draw, so that no more than one is ever held in
full. Each tensor rank quantises its own part: in blocks of 64 along the flattened part, so that wherever parts are
whole blocks, every layout holds the same numbers. bitsandbytes computes both directions.

Source: Dettmers et al. 2023 (QLoRA), without its second quantisation of the blocks' scales.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor
from torch.nn import Parameter

from megatron_7b.model.kernels import Kernels

BLOCK = 64
"""Elements that share a scale."""


class Nf4:
    """A matrix in four bits.

    Args:
        weight: Its values; not kept.
    """

    def __init__(self, weight: Tensor) -> None:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses a kernel for products, which is not used
        from bitsandbytes.functional import quantize_4bit

        self.shape, self.dtype = weight.shape, weight.dtype
        # Flattened: bitsandbytes 0.50 on a CPU decodes matrices wrongly whose rows are even and not whole blocks.
        flat = weight.detach().reshape(-1).contiguous()
        self._packed, self._state = quantize_4bit(flat, blocksize=BLOCK, quant_type="nf4", compress_statistics=False)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return int(self._packed.nbytes + self._state.absmax.nbytes)

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix as it is computed with."""
        from bitsandbytes.functional import dequantize_4bit

        decoded: Tensor = dequantize_4bit(self._packed, quant_state=self._state)
        return decoded.reshape(self.shape).to(dtype)

    def move_to(self, device: torch.device) -> None:
        """Hold it on another device."""
        self._packed = self._packed.to(device)
        self._state.to(device)


class _Product(torch.autograd.Function):
    """x Wᵀ with W in four bits; it is decoded again for the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Nf4) -> Tensor:
        ctx.weight = weight
        return x @ weight.decoded(x.dtype).t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.weight.decoded(gradient.dtype), None


class QuantizedWeight(torch.nn.Module):
    """Mixed into megatron-core's linear layers: `weight` has the shape of the matrix, and no memory."""

    weight: Parameter
    bias: Any
    skip_bias_add: Any
    quantized: Nf4 | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.quantized = None
        self._hold_place(torch.zeros((), dtype=self.weight.dtype, device=self.weight.device))

    @torch.no_grad()
    def take(self, weight: Tensor) -> None:
        """Hold a matrix from now on; `weight` itself is not kept."""
        assert weight.shape == self.weight.shape
        self.quantized = Nf4(weight.to(device=self.weight.device, dtype=self.weight.dtype))

    def _hold_place(self, element: Tensor) -> None:
        before = self.weight
        placeholder: Any = Parameter(element.expand(before.shape), requires_grad=False)
        for name in ("tensor_model_parallel", "partition_dim", "partition_stride"):
            setattr(placeholder, name, getattr(before, name))
        placeholder.take_values = self.take
        self.weight = placeholder

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedWeight":
        """Move what torch moves; a placeholder would be given memory."""
        placeholder = self._parameters.pop("weight")
        assert placeholder is not None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._parameters["weight"] = placeholder
        element = fn(torch.empty((), dtype=placeholder.dtype, device=placeholder.device))
        self._hold_place(element)
        if self.quantized is not None:
            self.quantized.move_to(element.device)
        return self

    def product(self, x: Tensor) -> Tensor:
        """Return x Wᵀ, [s, b, out/tp]."""
        assert self.quantized is not None, "the weight was not loaded"
        product: Tensor = _Product.apply(x, self.quantized)
        return product

    def _with_bias(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        bias: Parameter | None = self.bias
        return (output, bias) if bias is None or self.skip_bias_add else (output + bias, None)


class QuantizedColumnLinear(QuantizedWeight, ColumnParallelLinear):
    """Linear layer sharded along its outputs."""

    def forward(self, x: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Return the outputs [s, b, out/tp], and the bias if it is still to be added."""
        if self.sequence_parallel:
            x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=self.tp_group)
        else:
            x = copy_to_tensor_model_parallel_region(x, group=self.tp_group)
        return self._with_bias(self.product(x))


class QuantizedRowLinear(QuantizedWeight, RowParallelLinear):
    """Linear layer sharded along its inputs."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the outputs [s, b, out], or [s/tp, b, out], and the bias if it is still to be added."""
        combine = (
            reduce_scatter_to_sequence_parallel_region
            if self.sequence_parallel
            else reduce_from_tensor_model_parallel_region
        )
        return self._with_bias(combine(self.product(x), group=self.tp_group))


def quantized(base: Kernels) -> Kernels:
    """Return kernels whose linear layers hold their weights in four bits, whoever's classes the others are."""
    if base.norm_before_linear is IdentityOp:
        base = replace(base, norm_before_linear=base.norm)
    return replace(
        base,
        norm_linear=QuantizedColumnLinear,
        column_linear=QuantizedColumnLinear,
        row_linear=QuantizedRowLinear,
    )
