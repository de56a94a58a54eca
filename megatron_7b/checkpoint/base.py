"""What an adapter was trained beside: checkpoints that hold only what was trained name the one that has the rest.

The other checkpoint is known by what it holds, not by where it is: it may be moved, copied, or named anew. Imports no
torch.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from megatron_7b.checkpoint.folders import resolve_checkpoint, step_of
from megatron_7b.checkpoint.manifest import Base, Manifest, read_config, read_manifest
from megatron_7b.checkpoint.records import INDEX
from megatron_7b.errors import CheckpointError, MegatronError

_SHARD = ".distcp"
_OPTIONS = "--checkpoint.initialize-from (of convert: --base)"


@dataclass(frozen=True)
class TrainedPart:
    """What is saved of a model of which only a part was trained.

    Attributes:
        names: Of the parameters that were trained.
        base: The checkpoint that has the others.
    """

    names: frozenset[str]
    base: Base

    def base_seen_from(self, folder: Path) -> Base:
        """Return the record of the base for a checkpoint that will be at `folder`."""
        return replace(self.base, relative_path=os.path.relpath(self.base.path, folder))


def describe_base(folder: Path) -> Base:
    """Return what identifies a checkpoint as a base.

    Args:
        folder: A complete checkpoint.

    Raises:
        CheckpointError: It is damaged, or holds an adapter only.
    """
    folder = folder.resolve()
    check_is_whole(folder)
    return Base(identity=weights_identity(read_manifest(folder)), path=str(folder))


def check_is_whole(folder: Path) -> None:
    """Refuse a checkpoint that holds an adapter only, where a whole model is needed.

    Raises:
        CheckpointError: It is one, or damaged.
    """
    base = read_manifest(folder).base
    if base is not None:
        raise CheckpointError(
            f"{folder} holds an adapter only, trained beside {base.path}; a whole model is needed here",
            hint=f"merge them: megatron-7b convert to-hf --checkpoint {folder} --output H --merge, and take H",
        )


def find_base(folder: Path, named: str | Path | None = None, *, is_asked_for: bool = False) -> Path | None:
    """Return the checkpoint that has what an adapter checkpoint lacks; None if it lacks nothing.

    Args:
        folder: A complete checkpoint.
        named: Where to look first; then where it was when the adapter was saved, seen from there or from the root.
        is_asked_for: Whether a command names it, rather than the configuration of the run: then nothing else will do.

    Raises:
        CheckpointError: It is at none of these places, or the checkpoint is damaged.
    """
    base = read_manifest(folder).base
    if base is None:
        return None
    tried: dict[Path, str] = {}
    hint = f"{_OPTIONS} FOLDER names the checkpoint with that model, wherever it is now"
    for place in _places(folder, base, named):
        try:
            found = resolve_checkpoint(place)
            if weights_identity(read_manifest(found)) != base.identity:
                tried[place.absolute()] = "holds other weights"
            elif is_asked_for and tried:  # what was asked for is not it
                hint = f"leave out {_OPTIONS}: {found} is that model"
                break
            else:
                return found
        except MegatronError:
            tried[place.absolute()] = "holds no checkpoint" if place.exists() else "does not exist"
    raise CheckpointError(
        f"{folder} holds an adapter only; the model that it was trained beside was not found: "
        + "; ".join(f"{place} {problem}" for place, problem in tried.items()),
        hint=hint,
    )


def find_base_to_resume(folder: Path, named: str | Path | None) -> Path | None:
    """Return the same for a run that goes on.

    The run that it was started from may have gone on as well, so that its newest checkpoint has other weights by now:
    then the adapter's run continues beside those that it began with. A start that names anything else is refused.
    """
    before = read_config(folder).checkpoint.initialize_from
    is_another = named is not None and before is not None and _run_of(Path(named)) != _run_of(Path(before))
    return find_base(folder, named, is_asked_for=is_another)


def _run_of(place: Path) -> Path:
    """Return the run folder of a checkpoint, however it is named; of one outside of any run its own folder."""
    folder = place.resolve()
    if step_of(folder) is not None and folder.parent.name == "checkpoints":
        folder = folder.parent
    return folder.parent if folder.name == "checkpoints" else folder


def _places(folder: Path, base: Base, named: str | Path | None) -> Iterator[Path]:
    if named is not None:
        yield Path(named)
    if base.relative_path is not None:
        yield Path(os.path.normpath(folder.resolve() / base.relative_path))
    yield Path(base.path)


def weights_identity(manifest: Manifest) -> str:
    """Hash the records of the files that weights are in: the same wherever the checkpoint is.

    Those of an adapter are told apart by the base, too.
    """
    digest = xxhash.xxh3_128(b"" if manifest.base is None else manifest.base.identity.encode())
    for name, record in sorted(manifest.files.items()):
        if "/" not in name and (name == INDEX or name.endswith(_SHARD)):
            digest.update(f"{name} {record.bytes} {record.xxh3}\n".encode())
    return digest.hexdigest()
