"""A workaround for inaccurate first results of MKL's vector functions."""

import torch

_FUNCTIONS = ("sin", "cos", "exp", "expm1", "log", "log1p", "sqrt", "tanh", "erf")


def settle_vector_functions() -> None:
    """Call the element-wise functions that models use once, on one element and so on one thread.

    MKL looks for a function's kernel at its first call. Where several threads make that call together, one of them may
    compute its share with the kernel of lowest accuracy: sines off by 1e-4, once, and never again in that process.
    Every process that computes on a CPU calls this before anything else; further calls cost microseconds.

    Source: pytorch/pytorch#188792, open with torch 2.14 (MKL 2024.2; gone with MKL 2025).
    """
    for dtype in (torch.float32, torch.float64):
        one = torch.ones(1, dtype=dtype)
        for name in _FUNCTIONS:
            getattr(one, name)()
