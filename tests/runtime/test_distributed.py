"""How a process joins the default group."""

import datetime as dt
import os
import socket
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_7b.config.schema import RuntimeConfig
from megatron_7b.runtime.process import distributed
from megatron_7b.runtime.process.distributed import initialize_process, leave_process_group, process_group_options
from tests.support.ranks import run_ranks

TIMEOUT = dt.timedelta(minutes=3)


@pytest.mark.parametrize("is_launched", [True, False])
def test_groups_connect_at_first_use(is_launched: bool) -> None:
    """NCCL's do unless there is a `device_id`."""
    options = process_group_options("cuda", timeout=TIMEOUT, is_launched=is_launched)
    assert options["backend"] == "nccl"
    assert options["timeout"] == TIMEOUT
    assert "device_id" not in options
    assert ("world_size" in options) != is_launched


def _what_torch_is_given(runtime: RuntimeConfig) -> tuple[list[dict[str, Any]], object]:
    """Entry point of a rank: what init_process_group is called with, and the device that its group is bound to."""
    dist.destroy_process_group()
    calls: list[dict[str, Any]] = []
    original = dist.init_process_group

    def recorded(*args: object, **options: Any) -> None:
        assert not args
        calls.append({name: value for name, value in options.items() if name != "store"})
        original(**options)

    os.environ.pop("RANK", None)
    distributed.dist.init_process_group = recorded
    try:
        initialize_process(runtime)
    finally:
        distributed.dist.init_process_group = original
    return calls, dist.distributed_c10d._get_default_group().bound_device_id


def test_torch_is_given_these_and_nothing_else() -> None:
    ((calls, device),) = run_ranks(1, _what_torch_is_given, RuntimeConfig(distributed_timeout_minutes=3))
    expected = process_group_options("cpu", timeout=TIMEOUT, is_launched=False)
    assert calls == [{name: value for name, value in expected.items() if name != "store"}]
    assert device is None


def _join_three_times(port: int) -> list[float]:
    """Entry point of a rank: what a script does that trains, evaluates and generates in turn."""
    rank = dist.get_rank()
    dist.destroy_process_group()
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sums = []
    for number in range(3):
        initialize_process(RuntimeConfig(device="cpu"))
        total = torch.tensor(float(rank + number))
        dist.all_reduce(total)
        sums.append(total.item())
        if rank == 0:
            time.sleep(0.5)  # the other rank is back first, and must not take the old group's address for the new one's
        leave_process_group()
    return sums


def test_a_process_may_join_one_group_after_another() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    assert run_ranks(2, _join_three_times, port) == [[1.0, 3.0, 5.0]] * 2
