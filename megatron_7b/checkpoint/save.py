"""Saving: all ranks write and hash their shards in a temporary folder, which the main rank publishes."""

import contextlib
import logging
import queue
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from megatron_7b.checkpoint.companions import NO_COMPANIONS, Companions
from megatron_7b.checkpoint.folders import find_steps
from megatron_7b.checkpoint.manifest import Counters, Manifest, write_manifest
from megatron_7b.checkpoint.optimizer_state import OptimizerShare
from megatron_7b.checkpoint.publishing import check_free_space, discard, keep_newest, new_staging_folder, publish
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
    replace_older: bool = True,
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
        replace_older: Whether older checkpoints than the configuration wants to keep are removed.

    Returns:
        The published folder.

    Collective: all ranks.

    Raises:
        CheckpointError: there is too little disk space, or a rank could not write; nothing was published, nothing is
            left on the disk.
    """
    started = time.perf_counter()
    replicas = data_parallel_group()
    gather_parameters(chunks)
    model = model_state(chunks)
    share = OptimizerShare(optimizer, model, replicas.rank(), replicas.size()) if optimizer is not None else None
    own_bytes = _model_bytes(model) // replicas.size() + (share.num_bytes if share else 0)
    staging, num_bytes = _agree_on_staging_folder(checkpoints, counters.step, own_bytes, layout)
    tensors = {"model": model, "random": random_state(layout.rank, layout.world_size)}
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
    with removed_if_it_fails(staging, counters.step, num_bytes, is_main=layout.is_main):
        dist_checkpointing.save(tensors, str(staging), save_strategy(replicas if replicas.size() > 1 else None))
        if share is not None:
            share.write(staging)
        hashes = _hash_own_files(staging, layout)
        published = _broadcast_result(
            _try_to_publish(staging, manifest, config, companions, hashes) if layout.is_main else None
        )
    if layout.is_main:
        logger.info("saved %s: %.1f MB in %.1f s", published, num_bytes / 1e6, time.perf_counter() - started)
        if replace_older:
            keep_newest(published.parent, config.checkpoint.keep_last, published)
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


def _hash_own_files(staging: Path, layout: ParallelLayout) -> list[dict[str, FileRecord] | OSError]:
    """Hash on every rank the files that it has written, which its node still has cached; gather on the main rank.

    Returns:
        On the main rank, what each rank found, or why it could not; empty on the others.

    Collective: all ranks.
    """
    records: dict[str, FileRecord] | OSError
    try:
        records = hash_files(staging, sorted(staging.rglob(f"__{layout.rank}_*.distcp")))
    except OSError as error:
        records = error
    gathered: list[dict[str, FileRecord] | OSError] = [{}] * layout.world_size if layout.is_main else []
    dist.gather_object(records, gathered if layout.is_main else None, dst=0)
    return gathered


@contextlib.contextmanager
def removed_if_it_fails(staging: Path, step: int, num_bytes: int, *, is_main: bool = True) -> Iterator[None]:
    """Leave nothing of a checkpoint that could not be written, and say so in one error, whatever a with block raises.

    Args:
        staging: Where it is written.
        step: Of the checkpoint.
        num_bytes: Size of its tensors.
        is_main: Whether this rank removes it.

    Raises:
        CheckpointError: The block failed.
    """
    try:
        yield
    except (Exception, CheckpointException) as error:  # torch's own one is no Exception
        problem = _describe_failure(error, staging.parent, step, num_bytes)
        if is_main:
            discard(staging)
        raise problem from error


def _describe_failure(error: BaseException, checkpoints: Path, step: int, num_bytes: int) -> CheckpointError:
    """Say which checkpoint could not be written, where, why, and how much room it needs.

    Args:
        error: What was raised.
        checkpoints: The folder that was to hold it.
        step: Of the checkpoint.
        num_bytes: Size of its tensors.
    """
    room = f"it takes about {num_bytes / 1e6:,.1f} MB"
    with contextlib.suppress(OSError):
        room += f", and {shutil.disk_usage(checkpoints).free / 1e6:,.1f} MB are free there"
    return CheckpointError(
        f"the checkpoint of step {step} could not be written to {checkpoints}: {_reason(error)}; {room}",
        hint="free some room or quota, if that is the reason, and give the same command again",
    )


def _reason(error: BaseException) -> str:
    """One line of what libraries say in many: the first failure that they collected, and the file that it concerns."""
    if isinstance(error, CheckpointException):
        if not error.failures:
            return "another rank could not write"
        rank, (failure, _) = min(error.failures.items())
        return f"rank {rank}: {_reason(failure)}"
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list):
        _, target, reason = error.args[0][0]
        return f"{target}: {reason}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(
        error, RuntimeError
    ):  # of torch's writer in C++, or from megatron-core's workers, which lose the errno
        return f"a file could not be written to its end ({next(iter(str(error).splitlines()), '')})"
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _agree_on_staging_folder(checkpoints: Path, step: int, own_bytes: int, layout: ParallelLayout) -> tuple[Path, int]:
    """Check the free space and create the folder on the main rank.

    The folder that `checkpoints` lies in is not created: one that has gone is not brought back for a checkpoint that
    nobody would find.

    Returns:
        The folder, and the size of all ranks' tensors in bytes; every rank gets them, or the same error.
    """
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    total = torch.tensor(own_bytes, dtype=torch.int64, device=device)
    dist.all_reduce(total)
    outcome: Path | Exception | None = None
    if layout.is_main:
        try:
            find_steps(checkpoints)
            checkpoints.mkdir(exist_ok=True)
            check_free_space(checkpoints, int(total.item()), step=step)
            outcome = new_staging_folder(checkpoints, step)
        except CheckpointError as error:
            outcome = error
        except OSError as error:
            outcome = _describe_failure(error, checkpoints, step, int(total.item()))
    return _broadcast_result(outcome), int(total.item())


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
    hashes_of_ranks: Sequence[Records | OSError],
) -> Path | Exception:
    hashes: dict[str, FileRecord] = {}
    for found in hashes_of_ranks:
        if isinstance(found, OSError):
            return found
        hashes |= found
    try:
        return publish_staged(staging, manifest, config, companions, hashes)
    except OSError as error:
        return error


def _broadcast_result(outcome: Path | Exception | None) -> Path:
    """Give every rank what the main rank has: a folder, or an error that all raise. Collective: all ranks."""
    box = [outcome]
    dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], Exception):
        raise box[0]
    assert box[0] is not None
    return box[0]
