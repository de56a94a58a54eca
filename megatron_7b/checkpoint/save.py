"""Saving: all ranks write and hash their shards in a temporary folder, which the main rank publishes."""

import logging
import queue
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_7b.checkpoint.companions import NO_COMPANIONS, Companions
from megatron_7b.checkpoint.folders import check_free_space, keep_newest, new_staging_folder, publish
from megatron_7b.checkpoint.manifest import Counters, Manifest, write_manifest
from megatron_7b.checkpoint.optimizer_state import OptimizerShare
from megatron_7b.checkpoint.records import NO_RECORDS, FileRecord, Records, hash_files
from megatron_7b.checkpoint.sharding import model_state, random_state
from megatron_7b.config.schema import RunConfig
from megatron_7b.errors import CheckpointError
from megatron_7b.optim.optimizer import Optimizer, gather_parameters
from megatron_7b.parallel import ParallelLayout
from megatron_7b.parallel.groups import data_parallel_group

logger = logging.getLogger(__name__)


def save_checkpoint(
    checkpoints: Path,
    *,
    chunks: Sequence[torch.nn.Module],
    optimizer: Optimizer | None,
    counters: Counters,
    config: RunConfig,
    layout: ParallelLayout,
    companions: Companions = NO_COMPANIONS,
    sample_order: dict[str, Any] | None = None,
) -> Path:
    """Write a checkpoint and publish it.

    Args:
        checkpoints: Folder of all checkpoints of the run, on a file system that all ranks share.
        chunks: This rank's model chunks.
        optimizer: None saves the weights only.
        counters: Progress of the run.
        config: The effective configuration; `model.vocab_size` is set.
        layout: Position of this rank.
        companions: What is copied into the checkpoint.
        sample_order: What a resumed run must know of the samples that were read.

    Returns:
        The published folder.

    Collective: all ranks.

    Raises:
        CheckpointError: there is too little disk space, or a rank could not write; nothing was published.
    """
    started = time.perf_counter()
    replicas = data_parallel_group()
    gather_parameters(chunks)
    model = model_state(chunks)
    share = OptimizerShare(optimizer, model, replicas.rank(), replicas.size()) if optimizer is not None else None
    own_bytes = _model_bytes(model) // replicas.size() + (share.num_bytes if share else 0)
    staging = _agree_on_staging_folder(checkpoints, counters.step, own_bytes, layout)
    tensors = {"model": model, "random": random_state(layout.rank, layout.world_size)}
    try:
        dist_checkpointing.save(tensors, str(staging), save_strategy(replicas if replicas.size() > 1 else None))
        if share is not None:
            share.write(staging)
    except Exception as error:
        if layout.is_main:
            shutil.rmtree(staging, ignore_errors=True)
        raise CheckpointError(f"checkpoint of step {counters.step} could not be written: {error}") from error
    assert config.model.vocab_size is not None
    manifest = Manifest(
        counters=counters,
        vocab_size=config.model.vocab_size,
        params_dtype=str(next(chunks[0].parameters()).dtype).removeprefix("torch."),
        layout=str(layout),
        world_size=layout.world_size,
        has_optimizer=optimizer is not None,
        sample_order=sample_order,
    )
    hashes = _hash_own_files(staging, layout)
    published = _broadcast_result(
        _try_to_publish(staging, manifest, config, companions, hashes) if layout.is_main else None
    )
    if layout.is_main:
        size = sum(path.stat().st_size for path in published.rglob("*") if path.is_file())
        logger.info("saved %s: %.1f MB in %.1f s", published, size / 1e6, time.perf_counter() - started)
        keep_newest(checkpoints, config.checkpoint.keep_last)
    return published


def save_strategy(replicas: dist.ProcessGroup | None = None) -> Any:
    """Return megatron-core's save strategy: in this process, with the work divided among the replicas of a shard."""
    # megatron-core starts a manager process for the results of its writers, which re-imports the program (and hangs in
    # one without a __main__ guard). We save in this process, where a plain queue does.
    filesystem_async._results_queue = queue.Queue()
    strategy = TorchDistSaveShardedStrategy()
    return strategy if replicas is None else FullyParallelSaveStrategyWrapper(strategy, replicas)


def _model_bytes(model: dict[str, Any]) -> int:
    return sum(entry.data.numel() * entry.data.element_size() for entry in nested_values(model))


def _hash_own_files(staging: Path, layout: ParallelLayout) -> dict[str, FileRecord]:
    """Hash on every rank the files that it has written, which its node still has cached; gather on the main rank.

    Collective: all ranks.
    """
    records = hash_files(staging, sorted(staging.rglob(f"__{layout.rank}_*.distcp")))
    gathered: list[dict[str, FileRecord]] | None = [{}] * layout.world_size if layout.is_main else None
    dist.gather_object(records, gathered, dst=0)
    return {name: record for part in gathered or () for name, record in part.items()}


def _agree_on_staging_folder(checkpoints: Path, step: int, own_bytes: int, layout: ParallelLayout) -> Path:
    """Check the free space and create the folder on the main rank; every rank gets its name, or the same error."""
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    total = torch.tensor(own_bytes, dtype=torch.int64, device=device)
    dist.all_reduce(total)
    outcome: Path | Exception | None = None
    if layout.is_main:
        try:
            checkpoints.mkdir(parents=True, exist_ok=True)
            check_free_space(checkpoints, int(total.item()))
            outcome = new_staging_folder(checkpoints, step)
        except (OSError, CheckpointError) as error:
            outcome = error if isinstance(error, CheckpointError) else CheckpointError(f"{checkpoints}: {error}")
    return _broadcast_result(outcome)


def publish_staged(
    staging: Path,
    manifest: Manifest,
    config: RunConfig,
    companions: Companions,
    hashes: Records = NO_RECORDS,
) -> Path:
    """Add companions, configuration and hashes to the tensors in a staging folder, and publish it.

    Args:
        staging: From `new_staging_folder`.
        manifest: What the checkpoint is.
        config: Of the run.
        companions: What to copy.
        hashes: Of files that have been hashed already.
    """
    companions.copy_to(staging)
    write_manifest(staging, manifest, config, hashes)
    return publish(staging, manifest.counters.step)


def _try_to_publish(
    staging: Path,
    manifest: Manifest,
    config: RunConfig,
    companions: Companions,
    hashes: Records,
) -> Path | Exception:
    try:
        return publish_staged(staging, manifest, config, companions, hashes)
    except OSError as error:
        return CheckpointError(f"checkpoint of step {manifest.counters.step} could not be published: {error}")


def _broadcast_result(outcome: Path | Exception | None) -> Path:
    """Give every rank what the main rank has: a folder, or an error that all raise. Collective: all ranks."""
    box = [outcome]
    dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], Exception):
        raise box[0]
    assert box[0] is not None
    return box[0]
