"""Entry points of ranks for the checkpoint tests."""

import hashlib
from pathlib import Path
from typing import Any

import torch

from megatron_7b.config.schema import RunConfig
from tests.support.tiny_runs import build, run_steps


def digest_of_weights(trainer: Any) -> str:
    """Return one hash over the bits of this rank's parameters and optimizer state."""
    digest = hashlib.sha256()
    for chunk in trainer.model:
        for name, parameter in chunk.named_parameters():
            digest.update(name.encode())
            digest.update(parameter.detach().view(torch.uint8).numpy().tobytes())
    for adam in trainer.optimizer.torch_optimizers():
        for state in adam.state.values():
            for name in sorted(state):
                digest.update(state[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def train_save(config: RunConfig, folder: Path, num_steps: int) -> tuple[list[tuple[float, float]], str]:
    """Train from the start, save, and return (results of the steps, digest)."""
    from megatron_7b.checkpoint.manifest import Counters
    from megatron_7b.checkpoint.save import save_checkpoint

    trainer = build(config)
    results = run_steps(trainer, range(num_steps))
    save_checkpoint(
        folder,
        chunks=trainer.model,
        optimizer=trainer.optimizer,
        counters=Counters(step=num_steps, optimizer_steps=num_steps),
        config=config,
        layout=trainer.layout,
    )
    return results, digest_of_weights(trainer)


def resume_train(config: RunConfig, folder: Path, num_steps: int) -> tuple[list[tuple[float, float]], str]:
    """Resume from the newest checkpoint, train up to step `num_steps`, return (results of the steps, digest)."""
    from megatron_7b.checkpoint import resolve_checkpoint
    from megatron_7b.checkpoint.load import load_checkpoint

    trainer = build(config)
    counters = load_checkpoint(
        resolve_checkpoint(folder), chunks=trainer.model, optimizer=trainer.optimizer, layout=trainer.layout
    )
    results = run_steps(trainer, range(counters.step, num_steps))
    return results, digest_of_weights(trainer)


def digest_after(config: RunConfig, num_steps: int) -> tuple[list[tuple[float, float]], str]:
    """Train from the start without a break and return (results of the steps, digest)."""
    trainer = build(config)
    return run_steps(trainer, range(num_steps)), digest_of_weights(trainer)
