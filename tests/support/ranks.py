"""Real ranks for tests: `run_ranks(world_size, function, *args)` runs a function on several processes over gloo.

The processes are forked from a server that has torch, the CPU backend and megatron-core loaded: the first call pays for
the imports, later ones take a fraction of a second. The function must be importable; its results come back by rank.
"""

import datetime as dt
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from tests.support.fork_server import PRELOAD, fork_server


class RankFailedError(AssertionError):
    """A rank raised; the message is its traceback."""


def _serve(
    rank: int, world_size: int, rendezvous: str, pipe: Connection, function: Callable[..., Any], args: Any
) -> None:
    import torch
    import torch.distributed as dist

    from megatron_7b.runtime.cpu import backend as cpu_backend

    assert PRELOAD in sys.modules, "the fork server did not preload megatron-core: every rank would import it again"
    try:
        torch.set_num_threads(1)
        cpu_backend.install()
        dist.init_process_group(
            "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=world_size,
            timeout=dt.timedelta(seconds=120),
        )
        dist.barrier()  # a function that is done at once must not leave while another rank still connects to this one
        pipe.send((True, function(*args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        pipe.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 240.0) -> list[Any]:
    """Run `function(*args)` on `world_size` ranks of one process group.

    Args:
        world_size: Number of processes.
        function: Importable; asks torch.distributed for its rank.
        args: Picklable arguments, the same for all.
        timeout: Seconds after which all ranks are ended.

    Returns:
        The results, by rank.

    Raises:
        RankFailedError: a rank raised (the others are ended at once), died or took too long.
    """
    context = fork_server()
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_serve, args=(rank, world_size, f"{folder}/rendezvous", theirs, function, args), daemon=True
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return _collect(pipes, timeout)
        finally:
            for process in processes:
                process.join(timeout=5)
                if process.is_alive():
                    process.kill()


def _collect(pipes: list[Connection], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    waiting: dict[Connection, int] = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting:
        ready = wait(list(waiting), timeout=deadline - time.monotonic())
        if not ready:
            raise RankFailedError(f"ranks {sorted(waiting.values())} gave no answer within {timeout} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting.pop(pipe)
            try:
                ok, value = pipe.recv()
            except EOFError:
                raise RankFailedError(f"rank {rank} died without a word") from None
            if not ok:
                raise RankFailedError(f"rank {rank} of {len(pipes)}:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]
