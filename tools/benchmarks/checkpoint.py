#!/usr/bin/env python3
"""Saving and loading a checkpoint: seconds, bytes, and what it takes of a rank's memory.

    python -m torch.distributed.run --nproc-per-node 4 tools/benchmarks/checkpoint.py --config mini_cpu \
        --parallel.use-distributed-optimizer True --precision.params-dtype bf16

Builds the model and optimizer of a configuration, fills Adam's moments with numbers, saves twice and loads once into
a temporary folder (`--folder` names where: the disk decides), and prints a line each, with the rank that was slowest
and the one that needed most. Runs wherever pretraining runs.

`--steps 8` then trains on random tokens, in turn without saving, with a save after each eighth step, and with one that
is written while training continues: what a save costs is what its round takes longer than one without.
"""

import argparse
import itertools
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import torch.distributed as dist

from megatron_7b.checkpoint import resolve_checkpoint
from megatron_7b.checkpoint.load import load_checkpoint
from megatron_7b.checkpoint.manifest import Counters
from megatron_7b.checkpoint.pending import PendingSave
from megatron_7b.checkpoint.save import begin_save
from megatron_7b.cli.options import split_overrides
from megatron_7b.config import load_config
from megatron_7b.config.schema import RunConfig
from megatron_7b.data import Batch
from megatron_7b.parallel import ParallelLayout
from megatron_7b.parallel.groups import new_background_group
from megatron_7b.runtime.machine.device import torch_device
from megatron_7b.runtime.process.distributed import initialize_process
from megatron_7b.training.agreement import Ranks
from megatron_7b.training.assemble import with_vocab_size
from megatron_7b.training.learner import Learner, build_learner
from megatron_7b.training.step import train_step


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


def random_batches(config: RunConfig, layout: ParallelLayout) -> list[Batch]:
    """This rank's microbatches of a step."""
    training, s = config.training, config.data.seq_length
    number = training.global_batch_size // (training.micro_batch_size * layout.dp_size)
    ids = np.random.default_rng(layout.dp_rank).integers(
        config.model.vocab_size, size=(number, training.micro_batch_size, s + 1)
    )
    positions = np.broadcast_to(np.arange(s), ids[0, :, 1:].shape).copy()
    mask = np.ones(positions.shape, dtype=np.float32)
    return [Batch(one[:, :-1].copy(), one[:, 1:].copy(), mask, positions) for one in ids]


def compare_saves(
    learner: Learner, begin: Callable[[dist.ProcessGroup | None], PendingSave], *, steps: int, rounds: int
) -> dict[str, tuple[float, float]]:
    """Train with and without saves, in turn; return median seconds per round, and those that a save held up.

    Args:
        learner: What is trained and saved.
        begin: Begins a save.
        steps: Of a round.
        rounds: Of each kind.
    """
    batches, group = random_batches(learner.config, learner.layout), new_background_group()
    ranks = Ranks(learner.device)
    measured: dict[str, list[tuple[float, float]]] = {"none": [], "synchronous": [], "asynchronous": []}
    for number in range(rounds + 1):
        for kind, seconds in measured.items():
            start, pending = time.perf_counter(), None
            if kind != "none":
                pending = begin(group if kind == "asynchronous" else None)
                if kind == "synchronous":
                    pending.wait()
            held_up = time.perf_counter() - start
            for _ in range(steps):
                train_step(learner, batches, 1e-4)
            if pending is not None:
                pending.wait()
            ranks.maximum(0)
            if number:  # the first round warms up
                seconds.append((time.perf_counter() - start, held_up))
    return {
        kind: (statistics.median(total for total, _ in values), statistics.median(held for _, held in values))
        for kind, values in measured.items()
    }


def main() -> None:
    """Measure, and print on the first rank."""
    overrides, rest, _ = split_overrides(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", default=["mini_cpu"])
    parser.add_argument("--folder", type=Path, help="shared by all ranks; default: a temporary folder")
    parser.add_argument("--steps", type=int, default=0, help="train, and compare saves of both kinds; steps per save")
    parser.add_argument("--rounds", type=int, default=3, help="saves of each kind that are measured")
    flags = parser.parse_args(rest)
    config = with_vocab_size(load_config(flags.config, overrides), None)
    device_type = initialize_process(config.runtime)
    learner = build_learner(config, device_type)
    for adam in learner.optimizer.torch_optimizers():
        for state in adam.state.values():
            state["exp_avg"].normal_()
            state["exp_avg_sq"].uniform_()
    say: Callable[..., None] = print if learner.layout.is_main else lambda *_: None
    box = [tempfile.mkdtemp(dir=flags.folder) if learner.layout.is_main else ""]
    dist.broadcast_object_list(box)
    folder = Path(box[0])
    say(f"{learner.layout}, {os.cpu_count()} cores")

    def begin(step: int, background: dist.ProcessGroup | None = None) -> PendingSave:
        return begin_save(
            folder,
            chunks=learner.model,
            optimizer=learner.optimizer,
            counters=Counters(step=step),
            config=config,
            layout=learner.layout,
            background=background,
        )

    def load() -> None:
        newest = resolve_checkpoint(folder)
        load_checkpoint(newest, chunks=learner.model, optimizer=learner.optimizer, layout=learner.layout)

    for name, action in (
        ("first save", lambda: begin(1).wait()),
        ("second save", lambda: begin(2).wait()),
        ("load", load),
    ):
        seconds, megabytes = measured(action, torch_device(device_type))
        say(f"{name:12} {seconds:7.2f} s   {megabytes:+7.0f} MB on the rank that needs most")
    size = sum(path.stat().st_size for path in resolve_checkpoint(folder).rglob("*") if path.is_file())
    say(f"on disk      {size / 1e6:7.1f} MB")
    if flags.steps:
        steps = itertools.count(3)
        compared = compare_saves(
            learner, lambda group: begin(next(steps), group), steps=flags.steps, rounds=flags.rounds
        )
        for kind, (total, held_up) in compared.items():
            more = total - compared["none"][0]
            say(f"{kind:12} {total:7.2f} s for {flags.steps} steps, {more:+.2f} s; a save held them up {held_up:.2f} s")
    if learner.layout.is_main:
        shutil.rmtree(folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
