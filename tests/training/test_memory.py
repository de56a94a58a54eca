"""A step leaves nothing behind: what the C library's allocator has given out stays the same from step to step.

The resident memory says less: it creeps up for a hundred steps or so while the free space between tensors finds its
shape (glibc's aligned allocations split off slivers), and then stands still.
"""

import ctypes
import gc
import platform

import pytest

from tests.support.ranks import run_ranks
from tests.support.tiny_runs import build, run_steps, tiny_config

# A leaked hidden state, s × b × h × 4 bytes in each of four microbatches, would make 1.3 MB in these steps.
MEASURED_STEPS = 20
TOLERANCE_BYTES = 300_000


class _MallocInfo(ctypes.Structure):
    """`struct mallinfo2` of malloc.h."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = tuple((name, ctypes.c_size_t) for name in _names.split(" "))


def _bytes_in_use() -> int:
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _MallocInfo
    gc.collect()
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd)


def growth(parallel: dict[str, int]) -> int:
    """Entry point of a rank: bytes in use after `MEASURED_STEPS` steps more, once everything is warm."""
    trainer = build(tiny_config(parallel=parallel))
    run_steps(trainer, range(25))
    before = _bytes_in_use()
    run_steps(trainer, range(25, 25 + MEASURED_STEPS))
    return _bytes_in_use() - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="counts by glibc's mallinfo2")
@pytest.mark.parametrize("axis", ["tensor", "pipeline"])
def test_steps_leave_nothing_behind(axis: str) -> None:
    for grown in run_ranks(2, growth, {f"{axis}_model_parallel_size": 2}):
        assert grown < TOLERANCE_BYTES
