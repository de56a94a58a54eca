"""Why the kernel ended a process: from its counters, and once for real, in a control group that is too small."""

import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_7b.runtime.process.deaths import MemoryWatch, describe_death, signal_name
from tests.support.assets import REPOSITORY


class Kernel:
    """Files as the kernel shows them, of both versions of control groups."""

    def __init__(self, root: Path, version: int, *, mounted_inside: bool = False) -> None:
        self.own, self.vmstat = root / "cgroup", root / "vmstat"
        self.cgroups = root / "sys"
        folder = self.cgroups if version == 2 else self.cgroups / "memory"
        if not mounted_inside:
            folder = folder / "slurm" / "job_7"
        folder.mkdir(parents=True)
        self.events = folder / ("memory.events" if version == 2 else "memory.oom_control")
        self.own.write_text("0::/slurm/job_7\n" if version == 2 else "9:cpu:/\n4:memory:/slurm/job_7\n0::/\n")
        self.set(0, 0)

    def set(self, own: int, machine: int) -> None:
        self.events.write_text(f"low 0\nhigh 3\nmax 7\noom 1\noom_kill {own}\noom_group_kill 0\n")
        self.vmstat.write_text(f"pgfault 99\noom_kill {machine}\n")

    def watch(self) -> MemoryWatch:
        return MemoryWatch(self.cgroups, self.own, self.vmstat)


@pytest.fixture(params=[(1, False), (2, False), (2, True)])
def kernel(request: pytest.FixtureRequest, tmp_path: Path) -> Kernel:
    version, mounted_inside = request.param
    return Kernel(tmp_path, version, mounted_inside=mounted_inside)


def test_a_kill_in_the_own_group_is_certain(kernel: Kernel) -> None:
    kernel.set(4, 9)
    watch = kernel.watch()
    kernel.set(5, 10)
    words = describe_death(9, watch)
    assert re.search(r"the kernel ended it because memory ran out \(\d+\.\d GiB may be used here", words)


def test_a_kill_elsewhere_on_the_machine_is_probable(kernel: Kernel) -> None:
    watch = kernel.watch()
    kernel.set(0, 1)
    assert "the kernel ended a process of this machine because memory ran out: see `dmesg`" in describe_death(9, watch)


def test_a_kill_that_the_kernel_did_not_count_was_sent(kernel: Kernel) -> None:
    kernel.set(4, 9)
    assert "somebody sent it" in describe_death(9, kernel.watch())


def test_without_counters_both_are_possible(tmp_path: Path) -> None:
    watch = MemoryWatch(tmp_path / "none", tmp_path / "none", tmp_path / "none")
    assert "often the kernel ran out of memory: see `dmesg`" in describe_death(9, watch)


def test_signals_without_a_name_of_their_own() -> None:
    assert [signal_name(number) for number in (9, 40)] == ["SIGKILL", "signal 40"]


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A control group with 200 MiB of memory, for the processes that are put into it."""
    unified, memory = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")
    parent, limit = (memory, "memory.limit_in_bytes") if memory.is_dir() else (unified, "memory.max")
    group = parent / f"megatron_7b_{uuid.uuid4().hex[:8]}"
    try:
        group.mkdir()
        (group / limit).write_text(str(200 * 2**20))
        swap = group / ("memory.memsw.limit_in_bytes" if parent == memory else "memory.swap.max")
        if swap.exists():
            swap.write_text(str(200 * 2**20 if parent == memory else 0))
    except OSError as error:
        if group.is_dir():
            group.rmdir()
        pytest.skip(f"control groups cannot be made here: {error}")
    yield group
    group.rmdir()


LAUNCHER = """
import sys
from megatron_7b.runtime.process.launch import LaunchPlan, launch
sys.exit(launch([sys.executable, "-c", sys.argv[1]], LaunchPlan(2)))
"""
HUNGRY = """
import os, time
from megatron_7b.runtime.process import launched
launched.join_launcher()
held = [bytearray(b"x") * 2**20 for _ in range(400)] if os.environ["RANK"] == "1" else time.sleep(600)
"""


def test_a_rank_that_outgrows_its_memory_is_told_from_a_killed_one(small_group: Path) -> None:
    command = ["bash", "-c", f'echo $$ > {small_group}/cgroup.procs; exec "$0" "$@"', sys.executable, "-c", LAUNCHER]
    ended = subprocess.run(
        [*command, HUNGRY], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert ended.returncode == 137, ended.stderr
    assert "rank 1 was ended by SIGKILL; the kernel ended it because memory ran out" in ended.stderr
