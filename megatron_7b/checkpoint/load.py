"""Loading at any layout: verified files, strict names and shapes, optimizer state."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.fp8_utils import is_float8tensor
from torch import Tensor

from megatron_7b.checkpoint.base import check_is_whole
from megatron_7b.checkpoint.former_names import current_names
from megatron_7b.checkpoint.manifest import (
    Counters,
    Manifest,
    OnOptimizerChange,
    optimizer_starts_afresh,
    read_config,
    read_manifest,
    warn_of_missing_checksum,
)
from megatron_7b.checkpoint.optimizer_state import read_optimizer, read_weights_in_full
from megatron_7b.checkpoint.pieces import Piece, cut
from megatron_7b.checkpoint.records import OPTIMIZER, check_nothing_foreign, verify_files
from megatron_7b.checkpoint.sharding import (
    Sharded,
    blocks,
    model_state,
    parts,
    random_state_name,
    restore_random_state,
)
from megatron_7b.checkpoint.stored import StoredTensors
from megatron_7b.errors import CheckpointError
from megatron_7b.model.on_ranks import ModelOnRanks
from megatron_7b.model.parameters import TRAINING_ONLY
from megatron_7b.model.starting_head import find_head_difference
from megatron_7b.optim.optimizer import Optimizer
from megatron_7b.optim.state import renew_main_parameters, round_main_parameters
from megatron_7b.parallel import ParallelLayout

logger = logging.getLogger(__name__)


def load_weights(
    folder: Path,
    chunks: Sequence[torch.nn.Module],
    optimizer: Optimizer | None = None,
    *,
    verify: bool = True,
    may_lack: Set[str] = frozenset(),
    fresh: Set[str] = frozenset(),
    left: Set[str] = frozenset(),
    names: Set[str] | None = None,
    settle: Callable[[Any], None] | None = None,
) -> Manifest:
    """Load the parameters into this rank's chunks, whatever layout wrote them.

    Args:
        folder: A complete checkpoint.
        chunks: This rank's model chunks.
        optimizer: Theirs, before its first update: the run trains on, so FP32 parameters get all digits that the
            checkpoint has. Without it, the weights are those that the checkpoint's own run computed with.
        verify: Check every file's hash first.
        may_lack: Names of parameters that stay as they are if the checkpoint has none of their name.
        fresh: Names of parameters that stay as they are whatever the checkpoint has.
        left: Names of tensors that the checkpoint may have and the chunks have not.
        names: The parameters that it has, if that is not all of them; the others stay as they are.
        settle: Called with each chunk once its parameters are loaded: `Adapter.settle`.

    Collective: all ranks.

    Raises:
        CheckpointError: Files are damaged, or other parameters are missing or of another shape.
    """
    with_state = optimizer is not None  # main parameters are for training alone
    opened = _open(folder, verify=verify, with_state=with_state, must_be_whole=names is None)
    model = model_state(chunks, names)
    lacking = fresh | (may_lack - opened.weights.tensors.keys())
    model = {name: entry for name, entry in model.items() if entry.key not in lacking}
    _load_model(opened, chunks, model, left=left | fresh)
    if settle is not None:
        for chunk in chunks:
            settle(chunk.module if isinstance(chunk, DistributedDataParallel) else chunk)
    if optimizer is not None:
        renew_main_parameters(optimizer)  # of those that the checkpoint lacks
        _load_optimizer(opened, optimizer, model, only_main=True)
    return opened.manifest


def load_base(folder: Path, model: ModelOnRanks, chunks: Sequence[torch.nn.Module], *, verify: bool = True) -> None:
    """Load what an adapter was, or will be, trained beside.

    Args:
        folder: A checkpoint of a whole model, with any head.
        model: This rank's part of the model.
        chunks: Its chunks, with gradient buffers or without.
        verify: Check every file's hash first.

    Collective: all ranks.

    Raises:
        CheckpointError: As `load_weights`.
    """
    assert model.adapter is not None
    head = find_head_difference(model.config.model, read_config(folder).model)
    load_weights(
        folder,
        chunks,
        verify=verify,
        may_lack=model.adapter_names | head.may_lack,
        fresh=head.fresh,
        left=head.left,
        settle=model.adapter.settle,
    )


def load_checkpoint(
    folder: Path,
    *,
    chunks: Sequence[torch.nn.Module],
    optimizer: Optimizer,
    layout: ParallelLayout,
    verify: bool = True,
    on_optimizer_change: OnOptimizerChange = "refuse",
    names: Set[str] | None = None,
) -> Counters:
    """Load everything that a run resumes from.

    Args:
        folder: A complete checkpoint, written at any layout.
        chunks: This rank's model chunks.
        optimizer: Their optimizer.
        layout: Position of this rank. Random states are restored if the checkpoint was written at the same layout.
        verify: Check every file's hash first.
        on_optimizer_change: What to do if another optimizer wrote it.
        names: The parameters that it has, if that is not all of them; the others stay as they are.

    Collective: all ranks.

    Raises:
        CheckpointError: Files are damaged, parameters are missing or of another shape, there is no optimizer state, or
            it is another optimizer's.
    """
    started = time.perf_counter()
    opened = _open(folder, verify=verify, with_state=True, must_be_whole=names is None)
    manifest = opened.manifest
    if opened.state is None:
        raise CheckpointError(
            f"{folder} holds weights only, so a run cannot be resumed from it",
            hint="start a new run from its weights with --checkpoint.initialize-from"
            if names is None
            else "merge it with its base, `megatron-7b convert to-hf --merge`, and start a new adapter from there",
        )
    starts_afresh = optimizer_starts_afresh(folder, manifest, optimizer.name, on_optimizer_change)
    model = model_state(chunks, names)
    _load_model(opened, chunks, model)
    _load_optimizer(opened, optimizer, model, only_main=starts_afresh)
    optimizer.set_num_updates(0 if starts_afresh else manifest.num_updates)
    if manifest.layout == str(layout):
        with _same_error_on_all_ranks():
            restore_random_state(opened.weights.read_object(random_state_name(layout.rank, layout.world_size)))
    if layout.is_main:
        logger.info("loaded %s (written at %s) in %.1f s", folder, manifest.layout, time.perf_counter() - started)
    return manifest.counters


@dataclass(frozen=True)
class _Opened:
    """A checkpoint whose files have been found as they were saved.

    Attributes:
        folder: Where it is.
        manifest: What it is.
        weights: Its parameters and random states.
        state: Its optimizer state, if it has any and it was asked for.
    """

    folder: Path
    manifest: Manifest
    weights: StoredTensors
    state: StoredTensors | None


def _open(folder: Path, *, verify: bool, with_state: bool, must_be_whole: bool) -> _Opened:
    """Read the manifest on every rank and check each file on one of them.

    Collective: all ranks.

    Raises:
        CheckpointError: The checkpoint is damaged, or an adapter where a whole model is needed.
    """
    with _same_error_on_all_ranks():
        manifest = read_manifest(folder)
        if must_be_whole:
            check_is_whole(folder)
        if dist.get_rank() == 0:
            warn_of_missing_checksum(folder, manifest)
            check_nothing_foreign(folder, manifest.files)
        if verify:
            names = list(manifest.files)[dist.get_rank() :: dist.get_world_size()]
            verify_files(folder, manifest.files, names=names)
    with _same_error_on_all_ranks():
        renamed = current_names(folder, manifest)
        weights, state = StoredTensors(folder, manifest.files, renamed=renamed), None
        if with_state and manifest.has_optimizer:
            state = StoredTensors(folder, manifest.files, OPTIMIZER, renamed=renamed)
    return _Opened(folder, manifest, weights, state)


@contextlib.contextmanager
def _same_error_on_all_ranks() -> Iterator[None]:
    """Let all ranks raise what some of them have raised in a with block without communication.

    Collective: all ranks.
    """
    problem: CheckpointError | None = None
    try:
        yield
    except CheckpointError as error:
        problem = error
    problems: list[CheckpointError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    messages = dict.fromkeys(str(found.args[0]) for found in problems if found is not None)
    if messages:
        raise CheckpointError("; ".join(messages), hint=next(found.hint for found in problems if found)) from problem


def _load_model(
    opened: _Opened, chunks: Sequence[torch.nn.Module], model: dict[str, Sharded], *, left: Set[str] = frozenset()
) -> None:
    """Fill the parameters of this rank's chunks; those in FP32 from main parameters, if the state was opened.

    Args:
        opened: The checkpoint.
        chunks: This rank's model chunks.
        model: What `model_state` gave for them.
        left: Names of tensors that the checkpoint may have and the model has not.

    Collective: all ranks.

    Raises:
        CheckpointError: Parameters are missing or of another shape, or a file cannot be read.
    """
    _check_names_and_shapes(opened, model, left=left)
    with _same_error_on_all_ranks(), torch.no_grad():
        model = _load_each_alone(opened, model)
        tensors = {name: _fillable(entry.data) for name, entry in model.items()}
        of_fp32: list[Piece] = []
        others: list[Piece] = []
        for name, entry in model.items():
            pieces = cut(entry.key, blocks(entry), 0, tensors[name].view(-1))
            (of_fp32 if tensors[name].dtype == torch.float32 else others).extend(pieces)
        read_weights_in_full(opened.weights, opened.state, of_fp32)
        opened.weights.read(others)
    for index, chunk in enumerate(chunks):
        module = chunk.module if isinstance(chunk, DistributedDataParallel) else chunk
        prefix = f"chunk{index}."
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        absent, unexpected = module.load_state_dict(own, strict=False)
        absent = [name for name in absent if f"{prefix}{name}" in model]  # others stay as they are, or are no tensors
        if absent or unexpected:
            raise CheckpointError(f"{opened.folder}: parameters not loaded: {absent}; not known: {unexpected}")


def _load_each_alone(opened: _Opened, model: dict[str, Sharded]) -> dict[str, Sharded]:
    """Load parameters that are held in another form, one after the other, and return the others."""
    others = {}
    for name, entry in model.items():
        parameter: Any = entry.data
        if not hasattr(parameter, "take_values"):
            others[name] = entry
            continue
        values = torch.empty(parameter.shape, dtype=parameter.dtype)
        opened.weights.read(cut(entry.key, blocks(entry), 0, values.view(-1)))
        parameter.take_values(values)
    return others


def _fillable(parameter: Tensor) -> Tensor:
    """The parameter itself, or for one in FP8 a tensor of its nominal format, which has the room for any values."""
    if is_float8tensor(parameter):
        return torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
    return parameter.detach()


def _load_optimizer(opened: _Opened, optimizer: Optimizer, model: dict[str, Any], *, only_main: bool) -> None:
    with _same_error_on_all_ranks():
        try:
            read_optimizer(opened.weights, opened.state, optimizer, model, only_main=only_main)
        except CheckpointError as error:
            message = f"the optimizer's state in {opened.folder} could not be loaded: {error.args[0]}"
            raise CheckpointError(message, hint=error.hint) from error
    round_main_parameters(optimizer)


def _check_names_and_shapes(opened: _Opened, model: dict[str, Sharded], *, left: Set[str]) -> None:
    """Refuse a model that has other parameters than the checkpoint; all ranks, each with its own, raise the same error.

    A model with fewer layers would load without a word.

    Collective: all ranks.
    """
    own = {
        part.key: (part.global_shape, part.allow_shape_mismatch) for entry in model.values() for part in parts(entry)
    }
    of_ranks = [own] * dist.get_world_size()
    dist.all_gather_object(of_ranks, own)
    shapes = {name: shape for of_rank in of_ranks for name, shape in of_rank.items()}
    saved = {
        name: tensor
        for name, tensor in opened.weights.tensors.items()
        if name not in left and (name in shapes or not name.startswith(TRAINING_ONLY))
    }
    problems = [
        f"{what}: {', '.join(sorted(names)[:8])}" + (", …" if len(names) > 8 else "")
        for what, names in (
            (f"lacks {len(shapes.keys() - saved.keys())} tensors that this model has", shapes.keys() - saved.keys()),
            (f"holds {len(saved.keys() - shapes.keys())} tensors that this model lacks", saved.keys() - shapes.keys()),
        )
        if names
    ]
    for name in shapes.keys() & saved.keys():
        wanted, (found, is_padded) = tuple(shapes[name][0]), (saved[name].shape, shapes[name][1])
        # The rows that pad a vocabulary differ between layouts; those of tokens do not.
        fits = wanted[1:] == found[1:] and wanted[0] >= opened.manifest.vocab_size if is_padded else wanted == found
        if not fits:
            problems.append(f"holds {name} with shape {found}, this model has {wanted}")
    if problems:
        hint = "the configuration differs from the one that was saved: compare model.* with its config.yaml"
        lacking = shapes.keys() - saved.keys()
        if lacking and all(name.startswith(TRAINING_ONLY) for name in lacking):
            hint = (
                "the run has compared other layers with its teacher's so far: leave distillation.hidden and "
                "distillation.layer_map as they were, or start another run with --checkpoint.initialize-from"
            )
        raise CheckpointError(f"{opened.folder} {'; '.join(problems)}", hint=hint)
