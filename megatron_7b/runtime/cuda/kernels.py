"""Kernels for a GPU, of the same meaning as those for the CPU.

Which of them a device, its driver and the installed versions can run is found out once: each is run on a few numbers
and compared with torch. Where it fails, torch's operators do the work, in more memory and time.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def is_supported(x: Tensor) -> bool:
    """Return whether `softmax_` takes this: FP32 or BF16 on a GPU where Triton works."""
    return x.is_cuda and x.dtype in (torch.float32, torch.bfloat16) and _has_softmax(x.dtype)


def softmax_(x: Tensor, factor: Tensor, num_true: int) -> Tensor:
    """Do what `cpu.kernels.softmax_` does, on a GPU."""
    from megatron_7b.runtime.cuda import softmax_kernel

    assert x.is_contiguous()
    log_sum_exp = x.new_empty(x.shape[0], dtype=torch.float32)
    softmax_kernel.run(x, factor.contiguous(), log_sum_exp, num_true)
    return log_sum_exp


def adds_in_fp32(x: Tensor) -> bool:
    """Return whether `add_product_` takes factors like this: BF16 on a GPU whose products can end in FP32."""
    return x.is_cuda and x.dtype == torch.bfloat16 and _has_wide_products()


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a × b to an FP32 matrix within the product, so that no sum is rounded to BF16.

    Args:
        total: [n, m].
        a: BF16 [n, k].
        b: BF16 [k, m].
    """
    torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


def _works(name: str, attempt: Callable[[], bool]) -> bool:
    try:
        works, why = attempt(), "it gives other numbers than torch"
    except Exception as error:  # noqa: BLE001 - compilers, drivers and libraries fail in their own ways
        works, why = False, str(error).partition("\n")[0]
    if not works:
        logger.warning("%s is left to torch's operators: %s", name, why)
    return works


@functools.cache
def _has_softmax(dtype: torch.dtype) -> bool:
    return _works("the softmax of the loss", functools.partial(_softmax_is_right, dtype, torch.device("cuda")))


def _softmax_is_right(dtype: torch.dtype, device: Any) -> bool:
    logits = torch.linspace(-9, 9, 3 * 5000, device=device).view(5000, 3).t().contiguous().to(dtype)
    factor = torch.tensor([1.0, 0.0, 0.5], device=device)
    found = logits.clone()
    sums = softmax_(found, factor, 4999)
    right = logits[:, :4999].float()
    shares = torch.nn.functional.pad(right.softmax(dim=1) * factor[:, None], (0, 1))
    return torch.allclose(sums, right.logsumexp(dim=1), rtol=1e-5) and torch.allclose(
        found.float(), shares, rtol=1e-5 if dtype == torch.float32 else 0.01, atol=1e-9
    )


@functools.cache
def _has_wide_products() -> bool:
    return _works("adding weight gradients in FP32", functools.partial(_product_is_right, torch.device("cuda")))


def _product_is_right(device: Any) -> bool:
    a = torch.ones(64, 512, dtype=torch.bfloat16, device=device)
    b = torch.full((512, 64), 1.0078125, dtype=torch.bfloat16, device=device)  # 512 of them are no BF16 number
    total = torch.full((64, 64), 1.0, device=device)
    add_product_(total, a, b)
    return bool((total == 517.0).all())
