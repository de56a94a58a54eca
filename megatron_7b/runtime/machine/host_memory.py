"""The memory of this machine that is still to be had, read without importing torch."""

from collections.abc import Iterator
from pathlib import Path

from megatron_7b.runtime.machine.device_facts import memory_bytes

_MEMINFO, _OWN_CGROUPS, _CGROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_OWN_STATUS = Path("/proc/self/status")
_NO_LIMIT = 1 << 60  # cgroup v1 writes a number near 2^63 if there is no limit


def available_memory() -> int:
    """Return how many bytes more this machine's processes may take: free memory and swap, cut to the container's limit.

    What the kernel keeps in its cache of files counts as free, for the machine and within each limit. The limits are
    those of every control group from this process's own up to the root, in either version of Linux's interface.
    """
    meminfo = _numbers(_MEMINFO)
    if "MemAvailable" in meminfo:
        free = 1024 * (meminfo["MemAvailable"] + meminfo.get("SwapFree", 0))
    else:
        free = memory_bytes()  # not Linux: all of it, so that nothing is refused that might fit
    return max(0, min([free, *_left_in_groups()]))


def own_bytes() -> int:
    """Return how much memory this process holds now, without pages of files; 0 where that is not known.

    Pages of files (libraries, mapped corpora) are there as far as the system has them in its cache, which it shares
    among processes and takes back when memory is needed.
    """
    status = _numbers(_OWN_STATUS)
    return 1024 * (status.get("VmRSS", 0) - status.get("RssFile", 0))


def peak_own_bytes() -> int:
    """Return the most that `own_bytes` has been; 0 where that is not known.

    The kernel keeps the most of all resident pages; of those of files it is taken that as many were there then as now.
    """
    status = _numbers(_OWN_STATUS)
    return 1024 * max(0, status.get("VmHWM", 0) - status.get("RssFile", 0))


def _left_in_groups() -> Iterator[int]:
    """Yield what is left under each limit that applies to this process."""
    for line in _read(_OWN_CGROUPS).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            for root in (_CGROUPS, _CGROUPS / "unified"):
                yield from _left(root, path, limit="memory.max", usage="memory.current", cache="inactive_file")
        elif "memory" in controllers.split(","):
            yield from _left(
                _CGROUPS / "memory",
                path,
                limit="memory.limit_in_bytes",
                usage="memory.usage_in_bytes",
                cache="total_inactive_file",
            )


def _left(root: Path, path: str, *, limit: str, usage: str, cache: str) -> Iterator[int]:
    group = root / path.lstrip("/")
    # A container may see only its own group, as the root, and still be told the path that it has outside.
    for folder in (group, *group.parents):
        most, used = _read(folder / limit).strip(), _read(folder / usage).strip()
        if most.isdigit() and used.isdigit() and int(most) < _NO_LIMIT:
            yield int(most) - int(used) + _numbers(folder / "memory.stat").get(cache, 0)
        if folder == root:
            return


def _numbers(path: Path) -> dict[str, int]:
    """Return the lines `name number` or `name: number kB` of a file."""
    words = (line.replace(":", " ").split() for line in _read(path).splitlines())
    return {line[0]: int(line[1]) for line in words if len(line) >= 2 and line[1].isdigit()}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
