"""Attention of many queries on a CPU, both ways, without a matrix of queries × keys.

torch's attention for CPUs takes its products from a library that doesn't know every processor's instructions: this one
is 2 to 9 times as fast (docs/benchmarks/train_step.md), and leaves out what a window hides. What it doesn't take,
`is_supported` says, and the callers go to torch's. See csrc/kernels/attention*.h.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_7b.runtime.cpu import kernels


def is_supported(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float | None = None) -> bool:
    """Return whether `attention` takes these; one query is left to torch, which then has less to prepare."""
    s, _, n, d = query.shape
    return (
        kernels.is_supported(query, key, value)
        and key.shape == value.shape
        and key.shape[3] == d
        and n % key.shape[2] == 0
        and s > 1
        and (s <= key.shape[0] if causal else key.shape[0] > 0)
        and (scale is None or scale > 0.0)
    )


def _strided(x: Tensor) -> tuple[int, int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)


def _shape(query: Tensor, key: Tensor, window: int) -> tuple[int, ...]:
    s, b, n, d = query.shape
    return b, n, key.shape[2], s, key.shape[0], d, window


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, causal: bool, window: int, scale: float) -> Tensor:
        inputs = tuple(x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        s, b, n, _ = query.shape
        y = query.new_empty(query.shape)
        log_sum = query.new_empty(b, n, s, dtype=torch.float32)
        kernels.bound_kernels(query.dtype).attention(
            [_strided(x) for x in inputs], y.data_ptr(), log_sum.data_ptr(), _shape(query, key, window), causal, scale,
            torch.get_num_threads(),
        )  # fmt: skip
        ctx.save_for_backward(*inputs, y, log_sum)
        ctx.causal, ctx.window, ctx.scale = causal, window, scale
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, y, log_sum = ctx.saved_tensors
        grad_y = grad_y if grad_y.stride(-1) == 1 else grad_y.contiguous()
        gradients = [x.new_empty(x.shape) for x in (query, key, value)]
        kernels.bound_kernels(query.dtype).attention_backward(
            [_strided(x) for x in (query, key, value)], y.data_ptr(), _strided(grad_y), log_sum.data_ptr(),
            [x.data_ptr() for x in gradients], _shape(query, key, ctx.window), ctx.causal, ctx.scale,
            torch.get_num_threads(),
        )  # fmt: skip
        return *gradients, None, None, None


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return softmax(scale × query × keyᵀ) × value, as `is_supported` allows.

    Results depend neither on the number of threads nor on the batch around a text.

    Args:
        query: [s, b, n, d].
        key: [s_k, b, g, d], where equal shares of the n heads share one of g groups.
        value: As the key.
        causal: Each query sees the keys up to its own; the last query's is the last key.
        window: Keys that a query sees where it is causal, its own included; None: all.
        scale: Positive; 1 / √d unless given.

    Returns:
        [s, b, n, d], dense.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if causal and window is not None:
        unseen = max(0, key.shape[0] - query.shape[0] - window + 1)
        key, value = key[unseen:], value[unseen:]
    y: Tensor = _Attention.apply(query, key, value, causal, key.shape[0] if window is None else window, scale)
    return y
