"""What this machine is, read without importing torch: cores, memory, processor, C library, disk."""

import os
import platform
import shutil
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_DEVICES = Path("/dev")


def available_cores() -> int:
    """Cores that this process may use: its affinity mask, cut down to the container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read(_CGROUP / "cpu.max").strip().partition(" ")
    if quota.isdigit() and period.isdigit():
        cores = min(cores, max(int(quota) // int(period), 1))
    return cores


def threads_per_rank(num_local_ranks: int) -> int:
    """Compute threads for each of the ranks on this machine so that they share the cores."""
    return max(available_cores() // num_local_ranks, 1)


def processor() -> str:
    """Return the processor's name."""
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def bf16_instructions() -> list[str]:
    """Return the instructions that multiply bfloat16 natively, such as `amx_bf16`; empty if there are none."""
    flags: set[str] = set()
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        if line.startswith(("flags", "Features")):
            flags.update(line.partition(":")[2].split())
            break
    return [flag for flag in ("amx_bf16", "avx512_bf16", "avx_ne_convert", "bf16", "svebf16") if flag in flags]


def multiplies_bf16() -> bool:
    """Return whether the processor has instructions for whole BF16 matrix products: AVX512-BF16 or AMX."""
    return not {"amx_bf16", "avx512_bf16"}.isdisjoint(bf16_instructions())


def may_have_gpu() -> bool:
    """Return whether a driver offers a GPU to this process. Only torch knows whether it can be used."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return any(_DEVICES.glob("nvidia[0-9]*")) or any((_DEVICES / name).exists() for name in ("kfd", "dxg"))


def memory_bytes() -> int:
    """Memory that this process may use: the machine's, cut down to the container's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _read(_CGROUP / "memory.max").strip()
    return min(total, int(limit)) if limit.isdigit() else total


def free_disk_bytes(folder: Path) -> int:
    """Free space of the file system that holds `folder`, or the nearest ancestor that exists."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def glibc_version() -> tuple[int, int] | None:
    """Version of the C library, or None where it is not glibc."""
    name, version = platform.libc_ver()
    parts = version.split(".")
    return (int(parts[0]), int(parts[1])) if name == "glibc" and len(parts) >= 2 else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
