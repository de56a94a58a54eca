"""Weights of a checkpoint as whole tensors by canonical name, in one process, without building a model."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from megatron_7b.adapter import build_adapter
from megatron_7b.checkpoint.companions import NO_COMPANIONS, Companions
from megatron_7b.checkpoint.former_names import current_names
from megatron_7b.checkpoint.manifest import (
    Base,
    Counters,
    Manifest,
    read_config,
    read_manifest,
    warn_of_missing_checksum,
)
from megatron_7b.checkpoint.pieces import Block, Piece
from megatron_7b.checkpoint.publishing import check_free_space, new_staging_folder, removed_if_it_fails
from megatron_7b.checkpoint.records import check_nothing_foreign, verify_files
from megatron_7b.checkpoint.save import publish_staged
from megatron_7b.checkpoint.shards import write_shard
from megatron_7b.checkpoint.stored import StoredTensors
from megatron_7b.config.schema import ParallelConfig, RunConfig
from megatron_7b.errors import CheckpointError
from megatron_7b.model.kinds import parameter_table
from megatron_7b.model.parameters import TRAINING_ONLY, Parameter
from megatron_7b.parallel import build_layout


class CheckpointWeights(Mapping[str, Tensor]):
    """The parameters of a checkpoint, each read when it is asked for, vocabulary padding cropped.

    Of a checkpoint of an adapter these are the ones that were trained (`Manifest.base` has the others).

    Args:
        folder: A complete checkpoint.
        verify: Check every file's hash first.

    Raises:
        CheckpointError: Files are missing or damaged.
    """

    def __init__(self, folder: Path, *, verify: bool = True) -> None:
        manifest = read_manifest(folder)
        warn_of_missing_checksum(folder, manifest)
        check_nothing_foreign(folder, manifest.files)
        if verify:
            verify_files(folder, manifest.files)
        self._stored = StoredTensors(folder, manifest.files, renamed=current_names(folder, manifest))
        self._names = [name for name in self._stored.tensors if not name.startswith(TRAINING_ONLY)]
        config = read_config(folder)
        table, adapter = parameter_table(config.model, manifest.vocab_size), build_adapter(config)
        self._table = table if adapter is None else adapter.extended(table)

    def __getitem__(self, name: str) -> Tensor:
        parameter, entry = self._table[name], self._stored.tensors[name]
        return self.rows(name, 0, parameter.shape[0] if parameter.is_padded else entry.shape[0])

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Return rows [first, last) of a parameter, without reading the others."""
        entry = self._stored.tensors[name]
        shape = (last - first, *entry.shape[1:])
        tensor = torch.empty(shape, dtype=entry.dtype)
        offsets = (first, *(0 for _ in shape[1:]))
        self._stored.read([Piece(name, Block(entry.shape, offsets, shape), tensor)])
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def write_weights(
    checkpoints: Path,
    tensors: Iterable[tuple[str, Tensor]],
    config: RunConfig,
    *,
    companions: Companions = NO_COMPANIONS,
    step: int = 0,
    base: Base | None = None,
    records: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write whole tensors as a checkpoint without optimizer state, and publish it.

    Args:
        checkpoints: Folder that receives `step_…` and `latest`.
        tensors: Every parameter of the model by canonical name, in any order; the vocabulary unpadded. With a
            base: those that the adapter trains.
        config: Configuration of the model; `model.vocab_size` is known.
        companions: What is copied into the checkpoint.
        step: Number it is filed under.
        base: The checkpoint that has the other parameters, for one of an adapter.
        records: Texts that say how the weights came about, by the names of their files in the checkpoint.

    Returns:
        The published folder.

    Collective: none.

    Raises:
        CheckpointError: A parameter is missing, unknown or of another shape, or it could not be written; nothing was
            published, and nothing is left on the disk.
    """
    assert config.model.vocab_size is not None
    expected = _expected(config, config.model.vocab_size, is_apart=base is not None)
    pieces: dict[str, Piece] = {}
    for name, tensor in tensors:
        if name not in expected or tuple(tensor.shape) != expected[name].shape:
            wanted = expected[name].shape if name in expected else "no such parameter"
            raise CheckpointError(f"{name} has shape {tuple(tensor.shape)}, the model has {wanted}")
        pieces[name] = Piece(name, _whole(tuple(tensor.shape)), tensor.contiguous())
    if expected.keys() - pieces.keys():
        raise CheckpointError(f"parameters are missing: {', '.join(sorted(expected.keys() - pieces.keys()))}")
    checkpoints.mkdir(parents=True, exist_ok=True)
    num_bytes = sum(piece.data.nbytes for piece in pieces.values())
    check_free_space(checkpoints, num_bytes, step=step)
    manifest = Manifest(
        counters=Counters(step=step),
        vocab_size=config.model.vocab_size,
        params_dtype=str(next(iter(pieces.values())).data.dtype).removeprefix("torch."),
        layout=str(build_layout(ParallelConfig(), world_size=1, rank=0)),
        world_size=1,
        has_optimizer=False,
        base=base,
    )
    staging = new_staging_folder(checkpoints, step)
    with removed_if_it_fails(staging, step, num_bytes):
        shard = write_shard(staging, 0, pieces.values())
        for name, text in records.items():
            (staging / name).write_text(text, encoding="utf-8")
        return publish_staged(staging, [{"": shard}], manifest, config, companions)


def _expected(config: RunConfig, vocab_size: int, *, is_apart: bool) -> Mapping[str, Parameter]:
    """Return the parameters that a checkpoint has."""
    table, adapter = parameter_table(config.model, vocab_size), build_adapter(config)
    if not is_apart or adapter is None:
        return table
    names = adapter.trained_names(table)
    return {name: row for name, row in adapter.extended(table).items() if name in names}


def _whole(shape: tuple[int, ...]) -> Block:
    return Block(shape, (0,) * len(shape), shape)
