"""Keeps the C library from returning freed memory to the operating system."""

import ctypes
import platform

# Parameters of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Have freed memory stay with this process instead of going back to the operating system.

    A training step frees and allocates the same large tensors again and again. glibc maps and unmaps each of them, and
    the kernel fills every page with zeros at its first touch: of a step of `mini_cpu` that was a tenth of all processor
    time. The most that the process holds hardly changes.

    Returns:
        False if the C library is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    no_limit = -1
    return all(
        mallopt(parameter, value) == 1
        for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, no_limit), (_M_TOP_PAD, 64 << 20))
    )
