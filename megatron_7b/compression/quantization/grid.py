"""The numbers that weights are rounded to: a scale per row or group of a row, and what is between.

**Source:** symmetric quantisation as compressed-tensors 0.20 decompresses it: a weight is `q * scale`, rounded to the
scale's number format; inputs of a layer have a scale per token, the largest magnitude over half the number of steps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_7b.compression.quantization.schemes import Scheme


@dataclass(frozen=True)
class RoundedWeight:
    """A matrix in few bits.

    Attributes:
        steps: Whole numbers, or values of FP8, as FP32, [out, in].
        scales: In the number format that is stored, [out, groups].
    """

    steps: Tensor
    scales: Tensor

    def values(self) -> Tensor:
        """Return the weights that these stand for, in FP32: what readers of the folder compute with, [out, in]."""
        scales = _spread(self.scales, self.steps.shape[1])
        return (self.steps.to(scales.dtype) * scales).float()


def find_scales(weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """Return the scales by which the largest weight of each group fits.

    Args:
        weight: FP32, [out, in].
        scheme: What it is rounded to.
        dtype: What scales are stored in; they are rounded to it, before weights are rounded with them.

    Returns:
        [out, groups]
    """
    rows, width = weight.shape
    size = scheme.group_size or width
    largest = weight.view(rows, width // size, size).abs().amax(-1)
    scales = (largest / scheme.largest).to(dtype)
    return torch.where(scales == 0, torch.finfo(dtype).eps, scales)


def to_steps(weight: Tensor, scales: Tensor, scheme: Scheme) -> Tensor:
    """Round to the nearest value of the grid.

    Args:
        weight: FP32; any shape.
        scales: FP32, of a shape that fits it.
        scheme: Whose grid.
    """
    scaled = weight / scales
    if scheme.is_float:
        return scaled.clamp(-scheme.largest, scheme.largest).to(torch.float8_e4m3fn).float()
    limit = 2 ** (scheme.num_bits - 1)
    return scaled.round().clamp(-limit, limit - 1)


def round_to_nearest(weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> RoundedWeight:
    """Round every weight by itself.

    Args:
        weight: FP32, [out, in].
        scheme: What it is rounded to.
        dtype: What scales are stored in.
    """
    scales = find_scales(weight, scheme, dtype)
    return RoundedWeight(to_steps(weight, _spread(scales.float(), weight.shape[1]), scheme), scales)


def round_inputs(inputs: Tensor, scheme: Scheme) -> Tensor:
    """Return what a layer's inputs become, with a scale per token.

    Args:
        inputs: FP32, [..., in].
        scheme: One that rounds inputs.
    """
    scales = inputs.abs().amax(-1, keepdim=True) / scheme.largest
    scales = torch.where(scales == 0, torch.finfo(scales.dtype).eps, scales)
    return to_steps(inputs, scales, scheme) * scales


def _spread(scales: Tensor, width: int) -> Tensor:
    """Give each input of a row its group's scale, [out, in]."""
    return scales.repeat_interleave(width // scales.shape[1], dim=1)
