#!/usr/bin/env python3
"""Adapters beside full fine-tuning: time of a step, bytes held, and bytes of a checkpoint, in one process on a CPU.

    python tools/benchmarks/adapters.py --config mini_cpu --micro-batch-size 4 --steps 8

All models are built at first, from one seed, and take a step in turn, so that whatever else the machine does slows all
of them down alike. Times are medians without the first two steps.
"""

import argparse
import os
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from megatron_7b.adapter import build_adapter  # noqa: E402  # after the path is set, for a checkout without an install
from megatron_7b.checkpoint.save import num_bytes_of, own_pieces  # noqa: E402
from megatron_7b.config import RunConfig, load_config  # noqa: E402
from megatron_7b.config.adapters import AdapterConfig  # noqa: E402
from megatron_7b.data import Batch  # noqa: E402
from megatron_7b.model.builder import build_model  # noqa: E402
from megatron_7b.model.core_config import params_dtype  # noqa: E402
from megatron_7b.model.on_ranks import ModelOnRanks, build_on_ranks  # noqa: E402
from megatron_7b.objective import build_objective  # noqa: E402
from megatron_7b.optim.optimizer import Optimizer, wrap_data_parallel  # noqa: E402
from megatron_7b.parallel.groups import process_groups  # noqa: E402
from megatron_7b.runtime.machine.part_clock import PartClock  # noqa: E402
from megatron_7b.runtime.process.distributed import initialize_process  # noqa: E402
from megatron_7b.training.learner import Learner  # noqa: E402
from megatron_7b.training.step import train_step  # noqa: E402

CONTENDERS: dict[str, dict[str, Any]] = {
    "full fine-tuning": {"method": "none"},
    "lora, rank 8": {"method": "lora"},
    "lora, rank 8, q_proj and v_proj": {"method": "lora", "target_modules": ("q_proj", "v_proj")},
    "dora, rank 8": {"method": "dora"},
    "bottleneck, 64": {"method": "bottleneck"},
}
SKIPPED = 2


@dataclass
class Contender:
    """A model that learns, and what it has taken."""

    learner: Learner
    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)


def build(config: RunConfig, first: ModelOnRanks) -> Learner:
    """Build a learner beside others on the process groups that are there."""
    adapter = build_adapter(config)
    assert config.model.vocab_size is not None
    parts: dict[str, Any] = {"layout": first.layout, "groups": process_groups(), "device_type": "cpu"}
    chunks = build_model(config, vocab_size=config.model.vocab_size, adapter=adapter, **parts)
    if adapter is not None:
        adapter.settle(chunks[0])
    model = wrap_data_parallel(list(chunks), config, process_groups())
    optimizer = Optimizer(model, config, params_dtype(config.precision, "cpu"))
    return Learner(
        ModelOnRanks(config, first.layout, "cpu", chunks, adapter),
        model,
        optimizer,
        build_objective(config),
        PartClock("cpu"),
    )


def held_bytes(learner: Learner) -> tuple[int, int, int]:
    """Return the bytes of parameters, gradients, and the optimizer's state with FP32 main parameters."""
    parameters = [one for chunk in learner.on_ranks.chunks for one in chunk.parameters()]
    own = {one.untyped_storage().data_ptr() for one in parameters}
    state = [
        tensor
        for inner in learner.optimizer.torch_optimizers()
        for main, of_main in inner.state.items()
        for tensor in (main, of_main["exp_avg"], of_main["exp_avg_sq"])
    ]
    gradients: list[Any] = [one.main_grad for one in parameters if one.requires_grad]
    kept = [one for one in state if one.untyped_storage().data_ptr() not in own]
    return tuple(sum(one.nbytes for one in group) for group in (parameters, gradients, kept))  # type: ignore[return-value]


def main() -> None:
    """Train all contenders in turn, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="mini_cpu")
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    arguments = parser.parse_args()
    os.environ |= {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29517",
    }
    size = arguments.micro_batch_size
    settings = {
        "precision.params_dtype": arguments.dtype,
        "training.micro_batch_size": size,
        "runtime.num_threads": arguments.threads,
    }
    config = load_config(arguments.config, {**settings, "training.global_batch_size": size})
    initialize_process(config.runtime)
    first = build_on_ranks(config, "cpu", is_training=False)
    contenders = {
        name: Contender(build(replace(config, adapter=AdapterConfig(**adapter)), first))
        for name, adapter in CONTENDERS.items()
    }
    ids = np.random.default_rng(5).integers(0, config.model.vocab_size, (size, config.data.seq_length + 1))
    batch = Batch(
        ids[:, :-1].copy(), labels=ids[:, 1:].copy(), loss_mask=np.ones((size, config.data.seq_length), np.float32),
        position_ids=np.broadcast_to(np.arange(config.data.seq_length), (size, config.data.seq_length)).copy(),
    )  # fmt: skip
    for _ in range(arguments.steps + SKIPPED):
        for contender in contenders.values():
            wall, processor = time.perf_counter(), time.process_time()
            train_step(contender.learner, [batch], config.optimizer.lr)
            contender.wall.append(time.perf_counter() - wall)
            contender.processor.append(time.process_time() - processor)
    print(f"{torch.get_num_threads()} threads, {arguments.dtype}, {size} x {config.data.seq_length} tokens a step\n")
    print(
        "| trained | parameters | tokens/s | step | processor time | held: model + gradients + optimizer | checkpoint |"
    )
    print("|---|---|---|---|---|---|---|")
    base = statistics.median(contenders["full fine-tuning"].processor[SKIPPED:])
    for name, one in contenders.items():
        wall, processor = statistics.median(one.wall[SKIPPED:]), statistics.median(one.processor[SKIPPED:])
        parts, learner = held_bytes(one.learner), one.learner
        saved = num_bytes_of(own_pieces(learner.model, learner.optimizer, names=learner.on_ranks.names_apart))
        spelled = " + ".join(f"{part / 1e6:,.1f}" for part in parts)
        speed = (
            f"{ids[:, 1:].size / wall:,.0f} | {wall:.2f} s | {processor:.2f} s ({base / processor:.2f} times as fast)"
        )
        print(
            f"| {name} | {learner.on_ranks.num_trained:,} | {speed} | "
            f"{sum(parts) / 1e6:,.1f} MB ({spelled}) | {saved / 1e6:,.1f} MB |"
        )


if __name__ == "__main__":
    main()
