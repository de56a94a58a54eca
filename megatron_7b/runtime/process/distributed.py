"""Start and end of a process's part in a run: device, threads, default process group."""

import datetime as dt
import functools
import itertools
import os
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from megatron_7b.config.schema import RuntimeConfig
from megatron_7b.runtime.cpu import backend as cpu_backend
from megatron_7b.runtime.machine.device import DeviceType, local_rank, resolve_device
from megatron_7b.runtime.machine.device_facts import threads_per_rank


def initialize_process(runtime: RuntimeConfig) -> DeviceType:
    """Choose the device, put the CPU backend in place where it is needed, and join the default process group.

    Rank, world size and rendezvous come from the launcher's environment (`RANK`, `WORLD_SIZE`, `MASTER_ADDR`,
    `MASTER_PORT`); without them the process is a world of its own. A process group that exists already is kept.

    Collective: all ranks of the run.

    Raises:
        ConfigError: The device asked for is not there.
    """
    device_type = resolve_device(runtime.device)
    if device_type == "cpu":
        cpu_backend.install()
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(runtime.num_threads or threads_per_rank(local_world_size))
    else:
        # Kernels then start in the order of their launch: communication issued first overlaps with what follows.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        if runtime.deterministic:
            _choose_deterministic_kernels()
        torch.cuda.set_device(local_rank())
    if not dist.is_initialized():
        timeout = dt.timedelta(minutes=runtime.distributed_timeout_minutes)
        is_launched = "RANK" in os.environ
        options = process_group_options(device_type, timeout=timeout, is_launched=is_launched)
        dist.init_process_group(**options, **(_next_rendezvous(timeout) if is_launched else {}))
    return device_type


_group_numbers = itertools.count()
"""Of the groups that this process joins; the same on all ranks, as all join together."""


def _next_rendezvous(timeout: dt.timedelta) -> dict[str, Any]:
    """Return where the ranks meet this time: in the launcher's store, under a name of its own.

    A script may train, evaluate and generate in turn, each with a process group. torch would meet them all in one
    place, where a rank that comes early finds the addresses of the group before.
    """
    store = dist.PrefixStore(f"group {next(_group_numbers)}", _launcher_store(timeout))  # type: ignore[attr-defined]
    return {"store": store, **_own_place()}


@functools.cache
def _launcher_store(timeout: dt.timedelta) -> Any:
    """Return the store of the launcher's address; the first rank serves it as long as it lives."""
    place = _own_place()
    store, _, _ = next(rendezvous("env://", place["rank"], place["world_size"], timeout=timeout))
    store.set_timeout(timeout)
    return store


def _own_place() -> dict[str, int]:
    return {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}


def _choose_deterministic_kernels() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"  # Transformer Engine's attention
    os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a pass per buffer


def process_group_options(device_type: DeviceType, *, timeout: dt.timedelta, is_launched: bool) -> dict[str, Any]:
    """Return the arguments of `init_process_group`.

    There is no `device_id` among them: with one, torch connects every NCCL group as soon as it is made, and
    megatron-core makes some fifteen, of which a run uses few. That took 8 GB of an H200's memory for a model of 7 M
    parameters. Without it a group connects at its first use, on the device that `torch.cuda.set_device` has chosen.

    Args:
        device_type: Where this rank computes.
        timeout: How long a collective waits for a late rank.
        is_launched: Whether the environment describes a rendezvous; otherwise this process is a world of its own.
    """
    options: dict[str, Any] = {"backend": "nccl" if device_type == "cuda" else "gloo", "timeout": timeout}
    if is_launched:
        return options
    return {**options, "store": dist.HashStore(), "rank": 0, "world_size": 1}  # type: ignore[attr-defined]


def leave_process_group() -> None:
    """Leave the default process group, if one was joined. Collective: all ranks of the run."""
    if dist.is_initialized():
        dist.destroy_process_group()
