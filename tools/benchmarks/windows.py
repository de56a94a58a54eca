"""What attention to a window costs beside attention to the whole text, forward and backward, on this machine's CPU.

    python tools/benchmarks/windows.py [--threads 2]

By torch: to all tokens before, with a mask over all pairs, and in blocks, as where our kernel for CPUs is not used. By
our kernel: to all tokens before, and to the window. Medians of 5 runs of each way in turn; 8 query heads of 64
channels, 2 key-value heads, one text.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from megatron_7b.model.windowed_attention import attend_within_window
from megatron_7b.runtime.cpu import attention as cpu_attention

NUM_HEADS, NUM_GROUPS, WIDTH = 8, 2, 64
SIZES = ((2048, 256), (4096, 1024), (8192, 1024))
"""Tokens of the text, and of the window."""

type Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def attend_to_all(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:  # noqa: ARG001
    """Attend causally, without a window."""
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def attend_with_mask(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """Attend to a window by a mask over all pairs."""
    length = query.shape[2]
    mask = torch.ones(length, length, dtype=torch.bool).tril().triu(1 - window)
    return functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)


def attend_to_all_by_kernel(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:  # noqa: ARG001
    """Attend causally, without a window, by our kernel."""
    return cpu_attention.attention(*(x.permute(2, 0, 1, 3) for x in (query, key, value)), causal=True)


def attend_by_kernel(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """Attend to a window by our kernel."""
    return cpu_attention.attention(*(x.permute(2, 0, 1, 3) for x in (query, key, value)), causal=True, window=window)


WAYS: dict[str, Attend] = {
    "torch: all": attend_to_all,
    "mask": attend_with_mask,
    "blocks": attend_within_window,
    "kernel: all": attend_to_all_by_kernel,
    "window": attend_by_kernel,
}


def milliseconds(length: int, window: int, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """Return the median times of a forward and of a backward pass of each way."""
    heads = (NUM_HEADS, NUM_GROUPS, NUM_GROUPS)
    inputs = [
        torch.randn(length, 1, n, WIDTH, dtype=dtype).permute(1, 2, 0, 3).requires_grad_() for n in heads
    ]  # as layers have them
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    for _ in range(6):
        for name, attend in WAYS.items():
            begun = time.perf_counter()
            context = attend(*inputs, window)
            grad = torch.ones_like(context)
            middle = time.perf_counter()
            torch.autograd.grad(context, inputs, grad)
            seconds[name].append((middle - begun, time.perf_counter() - middle))
    return {
        name: (1e3 * statistics.median(f for f, _ in times[1:]), 1e3 * statistics.median(b for _, b in times[1:]))
        for name, times in seconds.items()
    }


def main() -> None:
    """Print a line for each size and number format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="compute threads (default: 2)")
    torch.set_num_threads(parser.parse_args().threads)
    print("forward / backward, ms")
    print(f"{'format':8}  {'tokens':>6}  {'window':>6}" + "".join(f"  {name:>15}" for name in WAYS))
    for dtype in (torch.float32, torch.bfloat16):
        for length, window in SIZES:
            times = milliseconds(length, window, dtype).values()
            name = str(dtype).removeprefix("torch.")
            columns = (f"{forward:.1f} / {backward:.1f}" for forward, backward in times)
            print(f"{name:8}  {length:6}  {window:6}" + "".join(f"  {one:>15}" for one in columns), flush=True)


if __name__ == "__main__":
    main()
