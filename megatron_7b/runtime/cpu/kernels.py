"""Kernels for the CPU: fused element-wise ones as differentiable functions, and those that decode token by token.

Each does in one pass over memory what torch's operators do in up to ten. They take FP32 and BF16 and compute in FP32;
`is_supported` says for which tensors, and the callers go to torch's operators for all others. See
csrc/include/megatron_7b/kernels.h.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from megatron_7b.runtime import _kernels

_CLASSES = {torch.float32: _kernels.FloatKernels, torch.bfloat16: _kernels.BFloat16Kernels}


@functools.cache
def bound_kernels(
    dtype: torch.dtype, instruction_set: str | None = None
) -> "_kernels.FloatKernels | _kernels.BFloat16Kernels":
    """Return the kernels for a dtype: the best that this processor can run, or those of an instruction set by name."""
    return _CLASSES[dtype](instruction_set or _kernels.instruction_sets()[0])


def is_supported(*tensors: Tensor) -> bool:
    """Return whether the kernels take these: on a CPU, all FP32 or all BF16."""
    dtype = tensors[0].dtype
    return dtype in _CLASSES and all(x.device.type == "cpu" and x.dtype == dtype for x in tensors)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        x = x.contiguous()
        width = x.shape[-1]
        rows = x.numel() // width
        y, inverse_rms = torch.empty_like(x), x.new_empty(rows, dtype=torch.float32)
        bound_kernels(x.dtype).rms_norm(
            x.data_ptr(), weight.data_ptr(), y.data_ptr(), inverse_rms.data_ptr(), rows, width, epsilon, _threads()
        )
        ctx.save_for_backward(x, weight, inverse_rms)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse_rms = ctx.saved_tensors
        grad_y = grad_y.contiguous()
        grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight, dtype=torch.float32)
        bound_kernels(x.dtype).rms_norm_backward(
            grad_y.data_ptr(), x.data_ptr(), weight.data_ptr(), inverse_rms.data_ptr(),
            grad_x.data_ptr(), grad_weight.data_ptr(), inverse_rms.numel(), x.shape[-1], _threads(),
        )  # fmt: skip
        return grad_x, grad_weight.to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return x / rms(x) × weight over the last dimension, [..., h]."""
    y: Tensor = _RMSNorm.apply(x, weight, epsilon)
    return y


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        width = x.shape[-1] // 2
        y = x.new_empty(*x.shape[:-1], width)
        bound_kernels(x.dtype).swiglu(x.data_ptr(), y.data_ptr(), x.numel() // (2 * width), width, _threads())
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        grad_y, grad_x, width = grad_y.contiguous(), torch.empty_like(x), x.shape[-1] // 2
        bound_kernels(x.dtype).swiglu_backward(
            grad_y.data_ptr(), x.data_ptr(), grad_x.data_ptr(), x.numel() // (2 * width), width, _threads()
        )
        return grad_x


def swiglu(x: Tensor) -> Tensor:
    """Return silu(gate) × up, where [..., 2f] holds gate and up side by side; [..., f]."""
    y: Tensor = _SwiGLU.apply(x)
    return y


_turns: Any = WeakTensorKeyDictionary()


def _cosine_and_sine(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Return FP32 cosines and sines [s, d / 2] of angles [s, 1, 1, d], whose halves are the same; kept with them."""
    known: tuple[Tensor, Tensor] | None = _turns.get(angles)
    if known is None:
        half = angles.detach()[:, 0, 0, : angles.shape[-1] // 2].float().contiguous()
        _turns[angles] = known = half.cos(), half.sin()
    return known


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor, sign: float) -> Tensor:
    if x.stride(-1) != 1:
        x = x.contiguous()
    s, b, n, d = x.shape
    y = x.new_empty(s, b, n, d)
    bound_kernels(x.dtype).rotate(
        x.data_ptr(), x.stride()[:3], y.data_ptr(), y.stride()[:3], (s, b, n, d),
        cosine.data_ptr(), sine.data_ptr(), 2 * cosine.shape[-1], sign, _threads(),
    )  # fmt: skip
    return y


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.turn = cosine, sine
        return _rotate(x, cosine, sine, 1.0)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.turn
        return _rotate(grad_y, cosine, sine, -1.0), None, None


def rotary_embedding(x: Tensor, angles: Tensor) -> Tensor:
    """Turn channel pairs (i, i + r / 2) of [s, b, n, d] by angles [s, 1, 1, r]; channels from r on stay as they are."""
    y: Tensor = _Rotation.apply(x, *_cosine_and_sine(angles))
    return y


def softmax_(x: Tensor, factor: Tensor, num_true: int) -> Tensor:
    """Replace each row of [n, v] by its softmax over the first `num_true` columns times its factor, the rest by zero.

    Args:
        x: Dense; overwritten.
        factor: FP32, [n].
        num_true: Columns that count; 0 is allowed.

    Returns:
        FP32 logarithms of the sums of exponentials, [n].
    """
    rows, width = x.shape
    assert x.is_contiguous()
    assert 0 <= num_true <= width
    factor = factor.contiguous()
    log_sum_exp = x.new_empty(rows, dtype=torch.float32)
    bound_kernels(x.dtype).softmax(
        x.data_ptr(), factor.data_ptr(), log_sum_exp.data_ptr(), rows, width, num_true, _threads()
    )
    return log_sum_exp


def accumulate_(total: Tensor, x: Tensor) -> None:
    """Add dense `x` of any supported number format to dense FP32 `total` in place, without a copy in FP32."""
    bound_kernels(x.dtype).accumulate(x.data_ptr(), total.data_ptr(), x.numel(), _threads())


MOST_ROWS = 32
"""Up to which `product` is faster than torch's, which reads weights at a third of the memory's speed for few rows."""
WIDEST_HEAD = 512
"""Of `decode_attention`."""


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x × weightᵀ + bias for few rows; each row of the result depends on its row of x alone. Without gradients.

    Args:
        x: Dense, [b, in].
        weight: Dense, [out, in].
        bias: [out].

    Returns:
        [b, out].
    """
    (rows, inputs), outputs = x.shape, weight.shape[0]
    y = x.new_empty(rows, outputs)
    bound_kernels(x.dtype).product(
        x.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr(), rows, inputs, outputs,
        _threads(),
    )  # fmt: skip
    return y


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    cosine: Tensor,
    sine: Tensor,
    positions: Tensor,
    scale: float,
) -> Tensor:
    """Put one token of each row into a cache, and attend from it to all that the row has. Without gradients.

    Args:
        query: [b, g, n/g, d]; the last two dimensions dense.
        key: [b, g, d], the last dimension dense.
        value: As the key.
        keys: Cache of at least b rows, [rows, g, positions, d]; the last two dimensions dense.
        values: As the keys.
        cosine: FP32 [b, r / 2], of the angles by which the first r channels of queries and keys are turned.
        sine: As the cosine.
        positions: Where the tokens of the rows stand, int64 [b].
        scale: Factor of the scores.

    Returns:
        [b, n × d].
    """
    b, groups, queries, width = query.shape
    y = query.new_empty(b, groups * queries * width)
    bound_kernels(query.dtype).decode_attention(
        [(x.data_ptr(), x.stride(0), x.stride(1)) for x in (query, key, value)],
        [(x.data_ptr(), x.stride(0), x.stride(1)) for x in (keys, values)],
        y.data_ptr(), cosine.data_ptr(), sine.data_ptr(), positions.data_ptr(),
        (b, groups, queries, width, 2 * cosine.shape[-1]), scale, _threads(),
    )  # fmt: skip
    return y


def _threads() -> int:
    return torch.get_num_threads()
