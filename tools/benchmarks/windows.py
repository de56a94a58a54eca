"""What attention to a window costs beside attention to the whole text, forward and backward, on this machine's CPU.

    python tools/benchmarks/windows.py [--threads 2]

Three ways: to all tokens before (torch's causal kernel), a mask over all pairs, and the blocks that layers with a
window use. Medians of 5 runs; 8 query heads of 64 channels, 2 key-value heads, one text.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from megatron_7b.model.windowed_attention import attend_within_window

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


def milliseconds(attend: Attend, length: int, window: int, dtype: torch.dtype) -> float:
    """Return the median time of a forward and a backward pass."""
    heads = (NUM_HEADS, NUM_GROUPS, NUM_GROUPS)
    inputs = [
        torch.randn(length, 1, n, WIDTH, dtype=dtype).permute(1, 2, 0, 3).requires_grad_() for n in heads
    ]  # as layers have them
    seconds = []
    for _ in range(6):
        begun = time.perf_counter()
        torch.autograd.grad(attend(*inputs, window).sum(), inputs)
        seconds.append(time.perf_counter() - begun)
    return 1e3 * statistics.median(seconds[1:])


def main() -> None:
    """Print a line for each size and number format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="compute threads (default: 2)")
    torch.set_num_threads(parser.parse_args().threads)
    print(f"{'format':8}  {'tokens':>6}  {'window':>6}  {'all, ms':>8}  {'mask, ms':>8}  {'blocks, ms':>10}")
    for dtype in (torch.float32, torch.bfloat16):
        for length, window in SIZES:
            ways = (attend_to_all, attend_with_mask, attend_within_window)
            whole, masked, blocks = (milliseconds(way, length, window, dtype) for way in ways)
            name = str(dtype).removeprefix("torch.")
            print(f"{name:8}  {length:6}  {window:6}  {whole:8.1f}  {masked:8.1f}  {blocks:10.1f}")


if __name__ == "__main__":
    main()
