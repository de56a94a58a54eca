#!/usr/bin/env python3
"""What measuring the parts of a step costs: steps with and without the clock in turn, in one process on a CPU.

    python tools/benchmarks/telemetry.py --config tiny_cpu --steps 60

Prints medians of time by the clock on the wall, for a machine that does nothing else, and of processor time, which
other programs change less; of the differences of neighbours; and the cost of one mark alone.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from megatron_7b.config import load_config  # noqa: E402  # after the path is set, for a checkout without an install
from megatron_7b.data import Batch  # noqa: E402
from megatron_7b.runtime.machine.part_clock import PartClock  # noqa: E402
from megatron_7b.runtime.process.distributed import initialize_process  # noqa: E402
from megatron_7b.training.learner import Learner, build_learner  # noqa: E402
from megatron_7b.training.step import train_step  # noqa: E402


def main() -> None:
    """Take steps in turn, and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="tiny_cpu")
    parser.add_argument("--steps", type=int, default=60, help="of each kind")
    arguments = parser.parse_args()
    os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29613"})
    overrides = {"model.vocab_size": "2048", "parallel.use_distributed_optimizer": "False"}
    config = load_config(arguments.config, overrides)
    initialize_process(config.runtime)
    learner = build_learner(config, "cpu")
    training, s = config.training, config.data.seq_length
    random = np.random.default_rng(1)
    batches = [
        _batch(random, training.micro_batch_size, s)
        for _ in range(training.global_batch_size // training.micro_batch_size)
    ]
    spent: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for number in range(2 * arguments.steps):
        is_measured = number % 2 == 0
        _tell(learner, learner.clock if is_measured else None)
        start = time.perf_counter(), time.process_time()
        if is_measured:
            with learner.clock.step():
                train_step(learner, batches, 1e-3)
        else:
            train_step(learner, batches, 1e-3)
        spent[is_measured].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    print(f"{arguments.config}: {arguments.steps - 2} steps with the clock and as many without, in turn")
    for number, name in enumerate(("wall time", "processor time")):
        columns = [[row[number] for row in spent[kind][2:]] for kind in (True, False)]
        with_clock, without = map(statistics.median, columns)
        lower, middle, upper = statistics.quantiles(one - other for one, other in zip(*columns, strict=True))
        print(
            f"{name:>14}: {with_clock:.4f} s with, {without:.4f} s without; differences of neighbours {middle:+.2e} s "
            f"({middle / without:+.3%}), quartiles {lower:+.2e} and {upper:+.2e}"
        )
    mark = _seconds_per_part(learner.clock)
    parts = 2 * len(batches) + 12
    print(f"a part takes {mark * 1e6:.2f} us: {parts} of them in this step are {mark * parts / without:.4%} of it")


def _batch(random: np.random.Generator, rows: int, s: int) -> Batch:
    ids = random.integers(0, 2000, (rows, s + 1))
    positions = np.broadcast_to(np.arange(s), (rows, s)).copy()
    return Batch(ids[:, :-1].copy(), ids[:, 1:].copy(), np.ones((rows, s), np.float32), positions)


def _tell(learner: Learner, clock: PartClock | None) -> None:
    for chunk in learner.model:
        chunk.config.timers = clock
    for part in learner.optimizer.parts:
        part.config.timers = clock


def _seconds_per_part(clock: PartClock, repeats: int = 20_000) -> float:
    start = time.process_time()
    with clock.step():
        for _ in range(repeats):
            clock("forward-compute", log_level=2).start()
            clock("forward-compute").stop()
    return (time.process_time() - start) / repeats


if __name__ == "__main__":
    main()
