"""Facts about this machine, against what the system itself says."""

import os
import subprocess
import sys
from pathlib import Path

from megatron_7b.runtime.machine import device_facts
from tests.support.assets import REPOSITORY


def test_cores_follow_the_affinity_mask():
    one = min(os.sched_getaffinity(0))
    program = (
        f"import os; os.sched_setaffinity(0, {{{one}}});"
        "from megatron_7b.runtime.machine.device_facts import available_cores, threads_per_rank;"
        "print(available_cores(), threads_per_rank(4))"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True, cwd=REPOSITORY).split() == ["1", "1"]


def test_cores_follow_the_quota_of_the_container(tmp_path, monkeypatch):
    monkeypatch.setattr(device_facts, "_CGROUP", tmp_path)
    monkeypatch.setattr(device_facts.os, "sched_getaffinity", lambda _: set(range(64)))
    assert device_facts.available_cores() == 64
    (tmp_path / "cpu.max").write_text("400000 100000\n")
    assert device_facts.available_cores() == 4
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert device_facts.available_cores() == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert device_facts.available_cores() == 64
    assert device_facts.threads_per_rank(3) == 21


def test_memory_follows_the_limit_of_the_container(tmp_path, monkeypatch):
    monkeypatch.setattr(device_facts, "_CGROUP", tmp_path)
    total = device_facts.memory_bytes()
    (tmp_path / "memory.max").write_text("1048576\n")
    assert device_facts.memory_bytes() == 1048576 < total
    (tmp_path / "memory.max").write_text("max\n")
    assert device_facts.memory_bytes() == total


def test_disk_of_a_folder_that_is_not_there_yet(tmp_path):
    assert device_facts.free_disk_bytes(tmp_path / "a" / "b") > 0


def test_bf16_instructions_are_among_the_flags_of_the_processor():
    flags = Path("/proc/cpuinfo").read_text().split()
    assert set(device_facts.bf16_instructions()) <= set(flags)
    assert ("amx_bf16" in flags) == ("amx_bf16" in device_facts.bf16_instructions())


def test_glibc_is_the_one_that_this_process_runs_on():
    version = device_facts.glibc_version()
    assert version is None or f"{version[0]}.{version[1]}" == os.confstr("CS_GNU_LIBC_VERSION").split()[1]
