"""What is left of the memory, read from files as the kernel writes them."""

from pathlib import Path

import pytest

from megatron_7b.runtime.machine import host_memory

GIB = 1 << 30


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the root: 16 GiB available, 1 GiB of swap, no control groups."""
    (tmp_path / "meminfo").write_text(
        "MemTotal:       33554432 kB\nMemFree:         1048576 kB\nMemAvailable:   16777216 kB\n"
        "HugePages_Total:       0\nSwapFree:        1048576 kB\n"
    )
    (tmp_path / "cgroup").write_text("")
    monkeypatch.setattr(host_memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(host_memory, "_OWN_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(host_memory, "_CGROUPS", tmp_path / "fs")
    return tmp_path


def write_group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_free_memory_and_swap(machine: Path) -> None:
    assert host_memory.available_memory() == 17 * GIB


def test_the_tightest_group_of_version_2_counts(machine: Path) -> None:
    """A job below a slice: each has a limit of its own, and cached files can be dropped."""
    (machine / "cgroup").write_text("0::/slice/job\n")
    write_group(machine / "fs", cgroup__controllers="memory")
    write_group(machine / "fs" / "slice", memory__max=12 * GIB, memory__current=9 * GIB)
    write_group(machine / "fs" / "slice" / "job", memory__max=8 * GIB, memory__current=3 * GIB)
    assert host_memory.available_memory() == 3 * GIB
    (machine / "fs" / "slice" / "memory.stat").write_text(f"anon 5\ninactive_file {4 * GIB}\n")
    assert host_memory.available_memory() == 5 * GIB
    write_group(machine / "fs" / "slice" / "job", memory__max="max")
    assert host_memory.available_memory() == 7 * GIB


def test_a_container_that_is_told_its_path_outside(machine: Path) -> None:
    (machine / "cgroup").write_text("0::/docker/0123abc\n")
    write_group(machine / "fs", memory__max=2 * GIB, memory__current=GIB)
    assert host_memory.available_memory() == GIB


def test_version_1(machine: Path) -> None:
    (machine / "cgroup").write_text("5:cpu,cpuacct:/\n4:memory:/slurm/job_7\n0::/\n")
    group = machine / "fs" / "memory" / "slurm" / "job_7"
    write_group(group, memory__limit_in_bytes=4 * GIB, memory__usage_in_bytes=5 * GIB)
    assert host_memory.available_memory() == 0
    (group / "memory.stat").write_text(f"cache 1\ntotal_inactive_file {3 * GIB}\n")
    assert host_memory.available_memory() == 2 * GIB
    write_group(group, memory__limit_in_bytes=9223372036854771712)
    assert host_memory.available_memory() == 17 * GIB


def test_this_machine_has_some() -> None:
    assert 10**8 < host_memory.available_memory() < 10**14
