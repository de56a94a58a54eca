"""GPTQ: round a matrix one input after the other, and let those that follow make up for the error.

**Source:** Frantar et al., "GPTQ" (arXiv 2210.17323), algorithm 1. The error that counts is that of the layer's output
on text, tr(D H D'), with D the change of the weights and H the sum of x x' over its inputs. Every row of the matrix
uses the same inverse of H, whose Cholesky factor has all that the steps of elimination need.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_7b.compression.quantization.grid import RoundedWeight, find_scales, to_steps
from megatron_7b.compression.quantization.schemes import Scheme

_BLOCK = 128
"""Inputs whose errors are passed on among themselves before they are passed on to the rest, in one product."""
_MOST_DAMPING = 1.0


@dataclass(frozen=True)
class GptqOptions:
    """How GPTQ goes about it.

    Attributes:
        damping: Added to the diagonal of H, as a share of its mean.
        act_order: Begin with the inputs that are largest, while most others are left to make up for them. Groups keep
            their places, so that readers need no order of the inputs.
    """

    damping: float = 0.01
    act_order: bool = True


def round_by_gptq(
    weight: Tensor, hessian: Tensor, scheme: Scheme, dtype: torch.dtype, options: GptqOptions | None = None
) -> RoundedWeight:
    """Round a matrix so that its output on text changes little.

    Args:
        weight: FP32, [out, in].
        hessian: Sum of x x' over the inputs, FP32 or FP64, [in, in]. An input that is always zero has no say; its
            weights are rounded to nearest.
        scheme: What it is rounded to.
        dtype: What scales are stored in.
        options: None takes the defaults.
    """
    options = options or GptqOptions()
    width = weight.shape[1]
    scales = find_scales(weight, scheme, dtype)
    by_input = scales.float().repeat_interleave(width // scales.shape[1], dim=1)
    diagonal = hessian.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True) if options.act_order else torch.arange(width)
    factor = _inverse_factor(hessian[order][:, order], options.damping).to(weight.dtype)
    remaining, by_input = weight[:, order].clone(), by_input[:, order]
    steps = torch.empty_like(remaining)
    for begin in range(0, width, _BLOCK):
        end = min(begin + _BLOCK, width)
        errors = torch.empty_like(remaining[:, begin:end])
        for column in range(begin, end):
            scale = by_input[:, column]
            steps[:, column] = to_steps(remaining[:, column], scale, scheme)
            error = (remaining[:, column] - steps[:, column] * scale) / factor[column, column]
            remaining[:, column:end] -= torch.outer(error, factor[column, column:end])
            errors[:, column - begin] = error
        remaining[:, end:] -= errors @ factor[begin:end, end:]
    return RoundedWeight(steps[:, torch.argsort(order)], scales)


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor of the inverse, in FP64; damped further if H is not positive definite so."""
    matrix = hessian.double()
    diagonal = matrix.diagonal()
    unused = diagonal == 0
    diagonal[unused] = 1.0
    mean = float(diagonal[~unused].mean()) if not bool(unused.all()) else 1.0
    while True:
        diagonal += damping * mean
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
            return factor
        damping = max(damping, 1e-4) * 10
        if damping > _MOST_DAMPING * 100:
            raise ArithmeticError("the sum over the layer's inputs is not finite")
