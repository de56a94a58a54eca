"""Saving: all ranks write and hash their shards in a temporary folder, which the main rank publishes."""

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.fp8_utils import is_float8tensor

from megatron_7b.checkpoint.base import TrainedPart
from megatron_7b.checkpoint.companions import NO_COMPANIONS, Companions
from megatron_7b.checkpoint.folders import find_steps, step_folder
from megatron_7b.checkpoint.manifest import NUM_UPDATES, Counters, Manifest, write_manifest
from megatron_7b.checkpoint.optimizer_state import OptimizerShare
from megatron_7b.checkpoint.pending import OwnShards, PendingSave, UnwrittenError
from megatron_7b.checkpoint.pieces import Piece, cut
from megatron_7b.checkpoint.publishing import (
    check_free_space,
    describe_failure,
    keep_newest,
    new_staging_folder,
    publish,
    removed_if_it_fails,
)
from megatron_7b.checkpoint.records import OPTIMIZER
from megatron_7b.checkpoint.sharding import Replica, Sharded, blocks, model_state, random_state, replica_of
from megatron_7b.checkpoint.shards import packed, write_index, write_shard
from megatron_7b.config.schema import RunConfig
from megatron_7b.errors import CheckpointError
from megatron_7b.optim.optimizer import Optimizer, gather_parameters
from megatron_7b.parallel import ParallelLayout

logger = logging.getLogger(__name__)

type Pieces = Mapping[str, Sequence[Piece]]
"""By folder within the checkpoint; empty for the checkpoint itself."""


def save_checkpoint(checkpoints: Path, **contents: Any) -> Path:
    """Write a checkpoint and publish it; the arguments are those of `begin_save`.

    Returns:
        The published folder.

    Collective: all ranks.

    Raises:
        CheckpointError: As `begin_save` and `PendingSave.wait`.
    """
    return begin_save(checkpoints, **contents).wait()


def begin_save(
    checkpoints: Path,
    *,
    chunks: Sequence[torch.nn.Module],
    optimizer: Optimizer | None,
    counters: Counters,
    config: RunConfig,
    layout: ParallelLayout,
    companions: Companions = NO_COMPANIONS,
    sample_order: dict[str, Any] | None = None,
    replace_older: bool = True,
    background: dist.ProcessGroup | None = None,
    part: TrainedPart | None = None,
) -> PendingSave:
    """Begin to write a checkpoint, which `PendingSave.wait` completes and publishes.

    Args:
        checkpoints: Folder of all checkpoints of the run, on a file system that all ranks share.
        chunks: This rank's model chunks.
        optimizer: None saves the weights only.
        counters: Progress of the run.
        config: The effective configuration; `model.vocab_size` is set.
        layout: Position of this rank.
        companions: What is copied into the checkpoint.
        sample_order: What a resumed run must know of the samples that were read.
        replace_older: Whether older checkpoints than the configuration wants to keep are removed.
        background: From `new_background_group`: this rank's share is copied to host memory, and a thread writes it
            while training continues. Without it nothing is written before `wait`, and nothing is copied.
        part: What is saved, if only a part of the model was trained; None saves all of it.

    Collective: all ranks.

    Raises:
        CheckpointError: There is too little disk space, or the folder cannot be written to.
    """
    started = time.perf_counter()
    pieces = own_pieces(chunks, optimizer, names=part.names if part else None)
    staging, num_bytes = _agree_on_staging_folder(checkpoints, counters.step, num_bytes_of(pieces), layout)
    if background is not None:
        pieces = _copied_to_host(pieces)
    random = random_state(layout.rank, layout.world_size)
    objects = {random.unique_key: packed(random.data)}
    assert config.model.vocab_size is not None
    manifest = Manifest(
        counters=counters,
        vocab_size=config.model.vocab_size,
        params_dtype=str(next(chunks[0].parameters()).dtype).removeprefix("torch."),
        layout=str(layout),
        world_size=layout.world_size,
        has_optimizer=optimizer is not None,
        optimizer=optimizer.name if optimizer else None,
        optimizer_scalars={NUM_UPDATES: optimizer.num_updates} if optimizer else None,
        sample_order=sample_order,
        base=part.base_seen_from(step_folder(checkpoints.resolve(), counters.step)) if part else None,
    )

    def write() -> OwnShards:
        return {
            part: write_shard(staging / part, layout.rank, held, {} if part else objects)
            for part, held in pieces.items()
        }

    def complete(shards: Sequence[OwnShards] | UnwrittenError) -> Path:
        with removed_if_it_fails(staging, counters.step, num_bytes):
            published = publish_staged(staging, shards, manifest, config, companions)
        logger.info("saved %s: %.1f MB in %.1f s", published, num_bytes / 1e6, time.perf_counter() - started)
        if replace_older:
            keep_newest(published.parent, config.checkpoint.keep_last, published)
        return published

    save = PendingSave(write, complete, background)
    if background is not None:
        save.begin()
        if layout.is_main:
            logger.info(
                "step %d is being saved while training continues, which waited %.2f s for it",
                counters.step, time.perf_counter() - started,
            )  # fmt: skip
    return save


def own_pieces(
    chunks: Sequence[torch.nn.Module], optimizer: Optimizer | None, *, names: Set[str] | None = None
) -> Pieces:
    """Return what this rank writes of model and optimizer: views, which the next step changes.

    Args:
        chunks: This rank's model chunks.
        optimizer: Theirs; None: it is not written.
        names: The parameters that are written; None: all of them.

    Collective: the data-parallel group.
    """
    gather_parameters(chunks)
    model = model_state(chunks, names)
    pieces: Pieces = {"": _share_of_weights(model)}
    if optimizer is None:
        return pieces
    return {**pieces, OPTIMIZER: OptimizerShare(optimizer, model).pieces}


def publish_staged(
    staging: Path,
    shards: Sequence[OwnShards] | UnwrittenError,
    manifest: Manifest,
    config: RunConfig,
    companions: Companions,
) -> Path:
    """Add indices, companions, configuration and hashes to the tensors in a staging folder, and publish it.

    Args:
        staging: From `new_staging_folder`.
        shards: What each rank has written.
        manifest: What the checkpoint is.
        config: Of the run.
        companions: What to copy.

    Returns:
        The published folder.
    """
    if isinstance(shards, UnwrittenError):
        raise shards
    for part in shards[0]:
        write_index(staging / part, [of_rank[part] for of_rank in shards])
    records = {str(Path(part, shard.file)): shard.record for of_rank in shards for part, shard in of_rank.items()}
    companions.copy_to(staging)
    write_manifest(staging, manifest, config, records)
    return publish(staging, manifest.counters.step)


def _share_of_weights(model: Mapping[str, Sharded]) -> list[Piece]:
    """Return equal parts of the parameters that the same ranks hold; the parts of all are disjoint and complete."""
    # Other tensor-parallel ranks or stages may have the same parameter: one of them has zeros here.
    entries: dict[Replica, list[Sharded]] = {}
    for entry in model.values():
        if not any(entry.replica_id[:-1]):
            entries.setdefault(replica_of(entry.key), []).append(entry)
    return [piece for replica, held in entries.items() for piece in _equal_part(held, replica)]


def _equal_part(entries: Sequence[Sharded], replica: Replica) -> list[Piece]:
    """Return this rank's part of parameters that all replicas hold."""
    pieces: list[Piece] = []
    total, first = sum(entry.data.numel() for entry in entries), 0
    begin, end = (total * number // replica.total for number in (replica.number, replica.number + 1))
    for entry in entries:
        start, stop = max(begin - first, 0), min(end - first, entry.data.numel())
        if start < stop:
            values = entry.data.dequantize() if is_float8tensor(entry.data) else entry.data
            pieces += cut(entry.key, blocks(entry), start, values.detach().view(-1)[start:stop])
        first += entry.data.numel()
    return pieces


def num_bytes_of(pieces: Pieces) -> int:
    """Return the size of pieces."""
    return sum(piece.data.nbytes for held in pieces.values() for piece in held)


def _copied_to_host(pieces: Pieces) -> Pieces:
    """Return copies in host memory, page-locked where they come from a GPU, which the next step cannot change."""
    copies = {
        part: [dataclasses.replace(piece, data=_host_copy(piece.data)) for piece in held]
        for part, held in pieces.items()
    }
    if any(piece.data.is_cuda for held in pieces.values() for piece in held):
        torch.cuda.synchronize()
    return copies


def _host_copy(data: torch.Tensor) -> torch.Tensor:
    copy = torch.empty(data.shape, dtype=data.dtype, pin_memory=data.is_cuda)
    return copy.copy_(data, non_blocking=data.is_cuda)


def _agree_on_staging_folder(checkpoints: Path, step: int, own_bytes: int, layout: ParallelLayout) -> tuple[Path, int]:
    """Check the free space and create the folder on the main rank.

    The folder that `checkpoints` is in is not created: one that has gone is not brought back for a checkpoint that
    nobody would find.

    Returns:
        The folder, and the size of all ranks' tensors in bytes; every rank gets them, or the same error.
    """
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    total = torch.tensor(own_bytes, dtype=torch.int64, device=device)
    dist.all_reduce(total)
    outcome: Path | CheckpointError | None = None
    if layout.is_main:
        try:
            find_steps(checkpoints)
            checkpoints.mkdir(exist_ok=True)
            check_free_space(checkpoints, int(total.item()), step=step)
            outcome = new_staging_folder(checkpoints, step)
        except CheckpointError as error:
            outcome = error
        except OSError as error:
            outcome = describe_failure(error, checkpoints, step, int(total.item()))
    box = [outcome]
    dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], CheckpointError):
        raise box[0]
    assert box[0] is not None
    return box[0], int(total.item())
