#!/usr/bin/env python3
"""Saving and loading a checkpoint: seconds, bytes, and what it takes of a rank's memory.

    python -m torch.distributed.run --nproc-per-node 4 tools/benchmarks/checkpoint.py --config mini_cpu \
        --parallel.use-distributed-optimizer True --precision.params-dtype bf16

Builds the model and optimizer of a configuration, fills Adam's moments with numbers, saves twice and loads once into
a temporary folder (`--folder` names where: the disk decides), and prints a line each, with the rank that was slowest
and the one that needed most. Runs wherever pretraining runs.
"""

import argparse
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

from megatron_7b.checkpoint import resolve_checkpoint
from megatron_7b.checkpoint.load import load_checkpoint
from megatron_7b.checkpoint.manifest import Counters
from megatron_7b.checkpoint.save import save_checkpoint
from megatron_7b.cli.options import split_overrides
from megatron_7b.config import load_config
from megatron_7b.runtime.machine.device import torch_device
from megatron_7b.runtime.process.distributed import initialize_process
from megatron_7b.training.agreement import Ranks
from megatron_7b.training.assemble import build_core, with_vocab_size


def peak_mb() -> float:
    """Largest resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def measured(action: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds until all ranks have done something, and by how many MB the peak memory of the worst has risen."""
    ranks = Ranks(device)
    ranks.maximum(0)  # waits for all, without the warning of NCCL's barrier about a device that it has to guess
    start, before = time.perf_counter(), peak_mb()
    action()
    ranks.maximum(0)
    figures = torch.tensor([time.perf_counter() - start, peak_mb() - before], dtype=torch.float64, device=device)
    dist.all_reduce(figures, op=dist.ReduceOp.MAX)
    seconds, megabytes = figures.tolist()
    return seconds, megabytes


def main() -> None:
    """Measure, and print on the first rank."""
    overrides, rest, _ = split_overrides(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", default=["mini_cpu"])
    parser.add_argument("--folder", type=Path, help="shared by all ranks; default: a temporary folder")
    flags = parser.parse_args(rest)
    config = with_vocab_size(load_config(flags.config, overrides), None)
    device_type = initialize_process(config.runtime)
    core = build_core(config, device_type)
    for adam in core.optimizer.torch_optimizers():
        for state in adam.state.values():
            state["exp_avg"].normal_()
            state["exp_avg_sq"].uniform_()
    say: Callable[..., None] = print if core.layout.is_main else lambda *_: None
    box = [tempfile.mkdtemp(dir=flags.folder) if core.layout.is_main else ""]
    dist.broadcast_object_list(box)
    folder = Path(box[0])
    say(f"{core.layout}, {os.cpu_count()} cores")

    def save(step: int) -> None:
        save_checkpoint(
            folder,
            chunks=core.model,
            optimizer=core.optimizer,
            counters=Counters(step=step),
            config=config,
            layout=core.layout,
        )

    def load() -> None:
        newest = resolve_checkpoint(folder)
        load_checkpoint(newest, chunks=core.model, optimizer=core.optimizer, layout=core.layout)

    for name, action in (("first save", lambda: save(1)), ("second save", lambda: save(2)), ("load", load)):
        seconds, megabytes = measured(action, torch_device(device_type))
        say(f"{name:12} {seconds:7.2f} s   {megabytes:+7.0f} MB on the rank that needs most")
    size = sum(path.stat().st_size for path in resolve_checkpoint(folder).rglob("*") if path.is_file())
    say(f"on disk      {size / 1e6:7.1f} MB")
    if core.layout.is_main:
        shutil.rmtree(folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
