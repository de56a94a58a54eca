"""What a death by signal means, in words: who sent it as far as that can be found out, and what to do."""

import resource
import shutil
import signal
import sys
from pathlib import Path

from megatron_7b.runtime.machine.device_facts import memory_bytes

_VMSTAT = Path("/proc/vmstat")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")

_MEANINGS: dict[int, str] = {
    signal.SIGSEGV: "native code crashed; please report it, with the traceback that it has printed",
    signal.SIGILL: "this processor lacks an instruction that the program was built for; run `make setup` here",
    signal.SIGFPE: "native code divided by zero; please report it, with the traceback that it has printed",
    signal.SIGABRT: "native code gave up, often because another rank was lost or a collective timed out",
}


class MemoryWatch:
    """Counts what the kernel has ended for want of memory since it was made."""

    def __init__(self, cgroups: Path = _CGROUPS, own_cgroups: Path = _OWN_CGROUPS, vmstat: Path = _VMSTAT) -> None:
        """Take the counts to compare with.

        Args:
            cgroups: Where the control groups are mounted.
            own_cgroups: File that names those of this process.
            vmstat: File with the counters of the whole machine.
        """
        self._own = _counter_files(cgroups, own_cgroups)
        self._vmstat = vmstat
        self._before = self._own_kills()
        self._machine_before = _read_counter(vmstat)

    @property
    def explanation(self) -> str:
        """Why a process may have got SIGKILL, as far as the kernel's counters show."""
        if _rose(self._before, self._own_kills()):
            return f"the kernel ended it because memory ran out ({_memory_facts()})"
        machine = _read_counter(self._vmstat)
        if _rose(self._machine_before, machine):
            return f"the kernel ended a process of this machine because memory ran out: see `dmesg` ({_memory_facts()})"
        if self._machine_before is not None:
            return "not by the kernel for want of memory: somebody sent it, such as `kill -9` or a batch system"
        return f"often the kernel ran out of memory: see `dmesg` ({_memory_facts()})"

    def _own_kills(self) -> int | None:
        counts = [count for path in self._own if (count := _read_counter(path)) is not None]
        return sum(counts) if counts else None


def signal_name(number: int) -> str:
    """Name of a signal, such as SIGKILL."""
    try:
        return signal.Signals(number).name
    except ValueError:  # one of the real-time signals
        return f"signal {number}"


def describe_death(number: int, memory: MemoryWatch) -> str:
    """Say what is known about the death by a signal beyond its name; may be empty."""
    if number == signal.SIGKILL:
        return memory.explanation
    if number == signal.SIGBUS:
        return f"a mapped file became shorter or could not be read, or its disk is full ({_shared_memory_facts()})"
    return _MEANINGS.get(number, "")


def _counter_files(cgroups: Path, own_cgroups: Path) -> list[Path]:
    """Return the files with the out-of-memory counters of this process's control group, version 2 and 1."""
    files = []
    for line in _read(own_cgroups).splitlines():
        _, controllers, path = line.split(":", 2)
        inside = path.strip().lstrip("/")
        if not controllers:
            folders, name = [cgroups, cgroups / "unified"], "memory.events"
        elif "memory" in controllers.split(","):
            folders, name = [cgroups / "memory"], "memory.oom_control"
        else:
            continue
        # In a container the path may be the host's, while the group itself is mounted at the top.
        candidates = [folder / part / name for folder in folders for part in (inside, "")]
        files += [path for path in candidates if path.is_file()][:1]
    return files


def _read_counter(path: Path) -> int | None:
    """Return N of the line `oom_kill N` of a file; None if it has none."""
    for line in _read(path).splitlines():
        name, _, value = line.partition(" ")
        if name == "oom_kill" and value.strip().isdigit():
            return int(value)
    return None


def _rose(before: int | None, after: int | None) -> bool:
    return before is not None and after is not None and after > before


def _memory_facts() -> str:
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"{memory_bytes() / 2**30:.1f} GiB may be used here; the largest rank had {largest / 2**30:.1f} GiB"


def _shared_memory_facts() -> str:
    try:
        return f"/dev/shm has {shutil.disk_usage('/dev/shm').free / 2**30:.1f} GiB left"
    except OSError:
        return "/dev/shm is not there"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
