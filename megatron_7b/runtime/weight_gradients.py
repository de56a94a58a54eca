"""Weight gradients that go straight into megatron-core's FP32 buffer, and what autograd gets in their place."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megatron_7b.runtime.cpu import kernels
from megatron_7b.runtime.cuda import kernels as cuda_kernels


def accumulate_weight_gradient(total_input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """Add grad_outputᵀ × total_input to main_grad: inside the product where all have the same dtype.

    Args:
        total_input: [tokens, in].
        grad_output: [tokens, out].
        main_grad: [out, in]; FP32 beside BF16 activations.
    """
    if grad_output.dtype == main_grad.dtype:
        main_grad.addmm_(grad_output.t(), total_input)
        return
    if main_grad.dtype == torch.float32 and cuda_kernels.adds_in_fp32(grad_output):
        cuda_kernels.add_product_(main_grad, grad_output.t(), total_input)
        return
    product = (grad_output.t() @ total_input).contiguous()
    if kernels.is_supported(product) and main_grad.dtype == torch.float32 and main_grad.is_contiguous():
        # torch's `add_` of two dtypes would first make an FP32 copy of the product.
        kernels.accumulate_(main_grad, product)
    else:
        main_grad.add_(product)


def stand_in(weight: Tensor) -> Tensor:
    """Return a gradient that tells the gradient buffer's hook that this weight's is in the buffer already.

    Source: the protocol of megatron-core's linear layers with `gradient_accumulation_fusion`: where the weight is also
    the embedding (`zero_out_wgrad`), the hook adds what autograd collected from both, so this part must be zero. On a
    CPU a sparse tensor without entries is, and costs nothing to make or to add.
    """
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    if weight.device.type != "cpu":
        return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)
    return torch.sparse_coo_tensor(size=weight.shape, dtype=weight.dtype, check_invariants=False)  # type: ignore[call-arg]


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.ids, ctx.weight = ids, weight
        return functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[None, Tensor]:
        main_grad = ctx.weight.main_grad
        rows = grad_y.reshape(-1, grad_y.shape[-1]).to(main_grad.dtype)
        main_grad.index_add_(0, ctx.ids.flatten(), rows)  # one row after the other, however many threads there are
        return None, stand_in(ctx.weight)


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Return rows of a weight; only the rows that were taken get a gradient, where there is a buffer for it.

    Args:
        ids: [...].
        weight: [v, h].

    Returns:
        [..., h].
    """
    if weight.requires_grad and hasattr(weight, "main_grad"):
        y: Tensor = _Embedding.apply(ids, weight)
        return y
    return functional.embedding(ids, weight)
