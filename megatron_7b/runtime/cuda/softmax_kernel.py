"""The kernel of `kernels.softmax_`, in Triton; with TRITON_INTERPRET=1 it runs on a CPU."""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Columns at a time: a power of two."""


@triton.jit
def softmax(x, factor, log_sum_exp, width, num_true, block: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
    """One program for each row, which reads it twice and writes it once; int64, as 2^31 logits are passed soon."""
    row = tl.program_id(0).to(tl.int64)
    x += row * width
    largest, total = -float("inf"), 0.0
    for start in range(0, num_true, block):
        columns = start + tl.arange(0, block)
        values = tl.load(x + columns, mask=columns < num_true, other=-float("inf")).to(tl.float32)
        now = tl.maximum(largest, tl.max(values, axis=0))
        total = total * tl.exp(largest - now) + tl.sum(tl.exp(values - now), axis=0)
        largest = now
    normalizer = largest + tl.log(total)
    tl.store(log_sum_exp + row, normalizer)
    scale = tl.load(factor + row)
    for start in range(0, width, block):
        columns = start + tl.arange(0, block)
        values = tl.load(x + columns, mask=columns < num_true, other=0.0).to(tl.float32)
        shares = tl.where(columns < num_true, tl.exp(values - normalizer) * scale, 0.0)
        tl.store(x + columns, shares.to(x.dtype.element_ty), mask=columns < width)


def run(x: Tensor, factor: Tensor, log_sum_exp: Tensor, num_true: int) -> None:
    """Start the kernel on dense [n, v], FP32 [n] and FP32 [n]."""
    softmax[(x.shape[0],)](x, factor, log_sum_exp, x.shape[1], num_true, block=BLOCK, num_warps=16)
