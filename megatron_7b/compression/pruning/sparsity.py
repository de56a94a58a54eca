"""Zeros in a matrix, where they are missed least on text.

Source: Sun et al. 2023, "Wanda" (arXiv 2306.11695), equation 1; Frantar and Alistarh 2023, "SparseGPT"
(arXiv 2301.00774), algorithm 1, with its block of 128 columns and its dampening of 1 %.
"""

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_7b.errors import ConfigError

type SparseMethod = Literal["magnitude", "wanda", "sparsegpt"]

_BLOCK, _DAMPENING = 128, 0.01


@dataclass(frozen=True)
class Pattern:
    """Which weights may become zero.

    Attributes:
        zeros: How many of `of` in a row that follow one another; None: any, `share` of them in every row.
        of: Their number.
        share: Of zeros.
    """

    share: float
    zeros: int | None = None
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """Read `0.5`, or `2:4`: two zeros in every four weights.

        Raises:
            ConfigError: It is neither.
        """
        if match := re.fullmatch(r"(\d+):(\d+)", text):
            zeros, of = int(match[1]), int(match[2])
            if 0 < zeros < of:
                return cls(zeros / of, zeros, of)
        try:
            share = float(text)
        except ValueError:
            share = -1.0
        if not 0.0 < share < 1.0:
            raise ConfigError(f"--sparsity is {text}, expected a share between 0 and 1 such as 0.5, or 2:4")
        return cls(share)

    def mask(self, scores: Tensor) -> Tensor:
        """Return True where [out, in] becomes zero: the lowest scores."""
        rows, width = scores.shape
        if self.zeros is None:
            return _lowest(scores, round(self.share * width))
        return _lowest(scores.reshape(-1, self.of), self.zeros).reshape(rows, width)


def _lowest(scores: Tensor, count: int) -> Tensor:
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter_(1, scores.argsort(dim=1, stable=True)[:, :count], value=True)


def sparsify(weight: Tensor, gram: Tensor, pattern: Pattern, method: SparseMethod) -> Tensor:
    """Return a matrix with zeros.

    Args:
        weight: FP32, [out, in].
        gram: Sum of x x' over its inputs, FP32, [in, in].
        pattern: Where zeros may be.
        method: `magnitude` takes the smallest weights, `wanda` those of the smallest product with their input's norm,
            `sparsegpt` those whose removal the other weights of the row make up for best, and changes these.
    """
    match method:
        case "magnitude":
            return weight.masked_fill(pattern.mask(weight.abs()), 0.0)
        case "wanda":
            return weight.masked_fill(pattern.mask(weight.abs() * gram.diagonal().sqrt()), 0.0)
        case "sparsegpt":
            return _sparsegpt(weight.clone(), gram, pattern)


def _sparsegpt(weight: Tensor, gram: Tensor, pattern: Pattern) -> Tensor:
    """Zero column by column, and let the columns after each make up for what it has changed."""
    inverse = _inverse_factor(gram)
    width = weight.shape[1]
    # Blocks end where groups of the pattern do.
    step = _BLOCK - _BLOCK % pattern.of
    for first in range(0, width, step):
        last = min(first + step, width)
        block, factor = weight[:, first:last], inverse[first:last, first:last]
        mask = pattern.mask((block / factor.diagonal()).square())
        errors = torch.zeros_like(block)
        for column in range(last - first):
            if pattern.zeros is not None and column % pattern.of == 0:
                group = slice(column, column + pattern.of)
                mask[:, group] = pattern.mask((block[:, group] / factor.diagonal()[group]).square())
            kept = block[:, column].masked_fill(mask[:, column], 0.0)
            error = (block[:, column] - kept) / factor[column, column]
            block[:, column:] -= error[:, None] * factor[column, column:]
            block[:, column] = kept
            errors[:, column] = error
        weight[:, last:] -= errors @ inverse[first:last, last:]
    return weight


def _inverse_factor(gram: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse of a Gram matrix, [in, in]."""
    damped = gram.double().clone()
    diagonal = damped.diagonal()
    diagonal += _DAMPENING * diagonal.mean() + torch.finfo(torch.float32).tiny
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True).float()
    return factor
