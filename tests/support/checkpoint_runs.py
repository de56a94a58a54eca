"""Entry points of ranks for the checkpoint tests."""

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from megatron_7b.config.schema import RunConfig
from tests.support.tiny_runs import build, run_steps


def digest_of_weights(trainer: Any) -> str:
    """Return one hash over the bits of this rank's parameters and optimizer state."""
    from megatron_7b.optim.optimizer import gather_parameters

    gather_parameters(trainer.model)
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


def train_save(
    config: RunConfig,
    folder: Path,
    num_steps: int,
    end: int | None = None,
    *,
    tokenizer: Path | None = None,
    build: Callable[[RunConfig], Any] = build,
) -> tuple[list[tuple[float, float]], str]:
    """Train from the start, save after `num_steps`, go on up to step `end`; return (results of the steps, digest)."""
    from megatron_7b.checkpoint.companions import Companions
    from megatron_7b.checkpoint.manifest import Counters
    from megatron_7b.checkpoint.save import save_checkpoint

    trainer = build(config)
    results = run_steps(trainer, range(num_steps))
    digest = digest_of_weights(trainer)
    save_checkpoint(
        folder,
        chunks=trainer.model,
        optimizer=trainer.optimizer,
        counters=Counters(step=num_steps, optimizer_steps=num_steps),
        config=config,
        layout=trainer.layout,
        companions=Companions(tokenizer=tokenizer),
    )
    assert digest_of_weights(trainer) == digest, "saving has changed the run"
    results += run_steps(trainer, range(num_steps, end or num_steps))
    return results, digest_of_weights(trainer)


def resume_train(
    config: RunConfig, folder: Path, num_steps: int, *, build: Callable[[RunConfig], Any] = build
) -> tuple[list[tuple[float, float]], str]:
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


def load_save(config: RunConfig, source: Path, target: Path) -> None:
    """Load the newest checkpoint and save what was loaded."""
    from megatron_7b.checkpoint import resolve_checkpoint
    from megatron_7b.checkpoint.load import load_checkpoint
    from megatron_7b.checkpoint.save import save_checkpoint

    trainer = build(config)
    parts = {"chunks": trainer.model, "optimizer": trainer.optimizer, "layout": trainer.layout}
    counters = load_checkpoint(resolve_checkpoint(source), **parts)
    save_checkpoint(target, counters=counters, config=config, **parts)


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, optimizer state included."""
    tensors: dict[str, torch.Tensor] = {}
    for part in (folder, folder / "optimizer"):
        reader = FileSystemReader(part)
        found = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
            load(found, storage_reader=reader, no_dist=True)
        tensors |= found
    return tensors
