"""The flags of commands that run on several ranks, and what they mean."""

import argparse
import os
from pathlib import Path

from megatron_7b.cli.options import Parser
from megatron_7b.errors import ConfigError
from megatron_7b.model.fitting import ranks_of_launcher
from megatron_7b.runtime.process.launch import LaunchPlan, is_rank


def add_launch_flags(parser: Parser) -> None:
    """Declare `--nproc` and the flags of a run on several nodes."""
    group = parser.add_argument_group("ranks (left out under torchrun)")
    group.add_argument("--nproc", type=int, help="ranks to start on this node; default: as few as the layout needs")
    group.add_argument("--nnodes", type=int, default=1, help="nodes; start the same command on each")
    group.add_argument("--node-rank", type=int, default=0, help="this node's number, from 0")
    group.add_argument("--master-addr", default="127.0.0.1", help="address of node 0")
    group.add_argument("--master-port", type=int, help="a free port on node 0; needed with several nodes")


def given_world_size(flags: argparse.Namespace) -> int | None:
    """Ranks of the whole run where the launcher's environment or `--nproc` says so, else None.

    Raises:
        ConfigError: `--nproc` or `--nnodes` is not positive, or several nodes come without `--nproc`.
    """
    if is_rank():
        return int(os.environ.get("WORLD_SIZE", "1"))
    for name in ("nproc", "nnodes"):
        number = getattr(flags, name)
        if number is not None and number < 1:
            raise ConfigError(f"--{name} {number} must be at least 1")
    if flags.nproc is None and flags.nnodes > 1:
        raise ConfigError(f"--nnodes {flags.nnodes} needs --nproc, the ranks to start on each of them")
    return flags.nproc * flags.nnodes if flags.nproc else None


def ranks_here(flags: argparse.Namespace, world_size: int) -> range:
    """Return the ranks of this machine, whichever launcher starts them."""
    if is_rank():
        return ranks_of_launcher(int(os.environ["RANK"]))
    num_local_ranks = world_size // flags.nnodes
    return range(flags.node_rank * num_local_ranks, (flags.node_rank + 1) * num_local_ranks)


def launch_plan(
    flags: argparse.Namespace,
    world_size: int,
    *,
    num_threads: int | None = None,
    log_folder: Path | None = None,
) -> LaunchPlan:
    """Return the plan that the flags of `add_launch_flags` describe.

    Raises:
        ConfigError: The flags contradict one another.
    """
    if flags.nnodes > 1 and flags.master_port is None:
        raise ConfigError(
            f"--nnodes {flags.nnodes} needs --master-port",
            hint="every node must know where node 0 listens: --master-addr HOST --master-port 29500",
        )
    if not 0 <= flags.node_rank < flags.nnodes:
        raise ConfigError(f"--node-rank {flags.node_rank} must be at least 0 and below --nnodes {flags.nnodes}")
    return LaunchPlan(
        num_local_ranks=world_size // flags.nnodes,
        num_nodes=flags.nnodes,
        node_rank=flags.node_rank,
        master_address=flags.master_addr,
        master_port=flags.master_port,
        num_threads=num_threads,
        log_folder=log_folder,
    )
