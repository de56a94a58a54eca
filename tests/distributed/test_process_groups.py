"""Whatever process groups a run makes are gone after it, in a process that lives on."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.evaluation.checkpoints import write_tiny_checkpoint
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import run_steps, tiny_config

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
SHARDED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS = {
    "one rank": (1, {}),
    "DP2, sharded": (2, SHARDED),
    "TP2+SP": (2, {**TP2, "sequence_parallel": True}),
    "PP2xVPP2": (2, {**PP2, "virtual_pipeline_model_parallel_size": 2}),
    "TP2xPP2xDP2, sharded": (8, {**TP2, **PP2, **SHARDED}),
}


def num_groups() -> int:
    """Process groups that torch knows of, the default one included."""
    return len(dist.distributed_c10d._world.pg_map)


def num_sockets() -> int:
    """Sockets that this process has open, listening or connected."""
    links = list(Path("/proc/self/fd").iterdir())  # one of them is this listing's own, closed again
    return sum(link.is_symlink() and str(link.readlink()).startswith("socket:") for link in links)


def _train_twice(parallel: dict[str, Any]) -> list[tuple[int, int, list[tuple[float, float]]]]:
    """Entry point of a rank: two runs after one another, each (groups while it runs, groups after it, losses)."""
    from megatron_7b.parallel.groups import leaving_process_groups
    from megatron_7b.training.learner import build_learner

    results = []
    for _ in range(2):
        with leaving_process_groups():
            losses = run_steps(build_learner(tiny_config(parallel=parallel), "cpu"), range(2))
            during = num_groups()
        results.append((during, num_groups(), losses))
    return results


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_leaves_no_group_behind(name: str) -> None:
    """But the default group, which it did not make."""
    world_size, parallel = LAYOUTS[name]
    for first, second in run_ranks(world_size, _train_twice, parallel):
        assert (first[0] > 1) == (world_size > 1)  # all groups of one rank are the default one
        assert first[1] == 1
        assert second == first


def _evaluate_under_a_launcher(checkpoint: Path, port: int, fails: bool) -> list[tuple[int, int]]:
    """Entry point of a rank: open a checkpoint as the only rank of a launcher, thrice; (groups, sockets) after each."""
    from megatron_7b.checkpoint.inference_config import inference_config
    from megatron_7b.checkpoint.open_model import opened_model

    dist.destroy_process_group()
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    config, left = inference_config(checkpoint, {"runtime.num_threads": 1}), []
    for _ in range(3):
        try:
            with opened_model(checkpoint, config):
                assert num_groups() == 1  # the default one, which is gone afterwards
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert fails
        left.append((num_groups(), num_sockets()))
    return left


@pytest.mark.parametrize("fails", [False, True])
def test_a_process_can_open_one_model_after_another(fails: bool, tmp_path: Path) -> None:
    """Also after a failure; the rendezvous is closed as well, so that its port is free again."""
    (checkpoint,) = run_ranks(1, write_tiny_checkpoint, tmp_path)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    (left,) = run_ranks(1, _evaluate_under_a_launcher, checkpoint, port, fails)
    assert {groups for groups, _ in left} == {0}
    assert len({sockets for _, sockets in left}) == 1
