"""Attention over a key-value cache, from rows at the same or at different positions: by our kernel and by torch."""

import pytest
import torch
from torch import Tensor

from megatron_7b.generation.cache import CachedAttention, KeyValueCache, place
from megatron_7b.runtime.cpu import attention as cpu_attention

HEADS, GROUPS, WIDTH, NEW = 4, 2, 16, 90


def expected(query: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
    """Attend from the last tokens of one text: [s, n, d], [s_k, g, d]."""
    s, s_k = query.shape[0], keys.shape[0]
    seen = torch.ones(s, s_k, dtype=torch.bool).tril(s_k - s)
    seen = seen if window is None else seen.triu(s_k - s - window + 1)
    q = query.transpose(0, 1).double()
    k, v = (x.transpose(0, 1).double().repeat_interleave(HEADS // GROUPS, 0) for x in (keys, values))
    scores = (q @ k.transpose(1, 2) * WIDTH**-0.5).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


@pytest.mark.parametrize("by_kernel", [True, False], ids=["kernel", "torch"])
@pytest.mark.parametrize("window", [None, 7, 120])
@pytest.mark.parametrize("starts", [(0, 0), (64, 64), (0, 130), (131, 70)])
def test_prompts_are_read_after_what_is_known(
    starts: tuple[int, int], window: int | None, by_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not by_kernel:
        monkeypatch.setattr(cpu_attention, "is_supported", lambda *_, **__: False)
    generator = torch.Generator().manual_seed(1)
    length = max(starts) + NEW
    keys, values = (torch.randn(length, 2, GROUPS, WIDTH, generator=generator) for _ in range(2))
    query = torch.randn(NEW, 2, HEADS, WIDTH, generator=generator)
    cache = KeyValueCache(1, GROUPS, WIDTH, dtype=torch.float32, device=torch.device("cpu"))
    cache.reserve(3, length)
    attention = CachedAttention(cache, 0, None, window)
    cache.begin(place(1, (0, 0), length, torch.device("cpu")))
    cache.append(0, keys, values)  # the later ones are left over, as of a longer text
    cache.begin(place(1, starts, NEW, torch.device("cpu")))
    new = [torch.stack([x[start : start + NEW, row] for row, start in enumerate(starts)], 1) for x in (keys, values)]
    y = attention(query, *new, None)
    for row, start in enumerate(starts):
        end = start + NEW
        wanted = expected(query[:, row], keys[:end, row], values[:end, row], window)
        torch.testing.assert_close(y[:, row].double(), wanted, rtol=1e-5, atol=1e-5)
