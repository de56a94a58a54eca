"""Names in checkpoints of formats 1 and 2: megatron-core's, whose decoders count attention and MLP as a layer each."""

from collections.abc import Callable
from pathlib import Path

from megatron_7b.checkpoint.manifest import Manifest, read_config
from megatron_7b.errors import CheckpointError
from megatron_7b.model.kinds import parameter_table

_OPTIMIZER_STATE = "optimizer.state."
"""Followed by the kind of state, a dot and the name of the parameter."""


def current_names(folder: Path, manifest: Manifest) -> Callable[[str], str] | None:
    """Return what gives a stored tensor the name that it would have been saved under today; None if it has it already.

    Args:
        folder: A complete checkpoint.
        manifest: Its manifest.

    Raises:
        CheckpointError: Its configuration is damaged.
        ConfigError: Its configuration is not one of this version.
    """
    if not manifest.has_core_names:
        return None
    table = parameter_table(read_config(folder).model, manifest.vocab_size)

    def current(name: str) -> str:
        prefix, core_name = "", name
        if name.startswith(_OPTIMIZER_STATE):
            kind, core_name = name.removeprefix(_OPTIMIZER_STATE).split(".", maxsplit=1)
            prefix = f"{_OPTIMIZER_STATE}{kind}."
        try:
            return prefix + table.by_core_name(core_name).name
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error.args[0]}", hint=error.hint) from error

    return current
