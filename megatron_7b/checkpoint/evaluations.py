"""What was measured on a checkpoint, kept in its own folder: STEP/evaluations/*.json.

Each file says on which weights it was measured, so that it is never taken for what others can do.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_7b.checkpoint.base import weights_identity
from megatron_7b.checkpoint.manifest import read_manifest
from megatron_7b.errors import ConfigError

EVALUATIONS = "evaluations"
WEIGHTS = "weights"
"""Key of the hash of the weights that a file of results was measured on."""
_LONGEST_NAME = 100


def evaluation_file(folder: Path, name: str) -> Path:
    """Return where the results of an evaluation are kept, and make the folder.

    Args:
        folder: The checkpoint.
        name: What was measured; the same name replaces the file.

    Raises:
        ConfigError: The checkpoint's folder cannot be written to.
    """
    plain = re.sub(r"[^\w.+-]+", "_", name)[:_LONGEST_NAME]
    home = folder / EVALUATIONS
    try:
        home.mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{home} cannot be made: {error.strerror}", hint="--output F.json writes the results elsewhere"
        ) from error
    return home / f"{plain}.json"


def with_weights(content: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return results that say on which weights they were measured."""
    return {**content, WEIGHTS: weights_identity(read_manifest(folder))}


def kept_evaluations(folder: Path) -> list[Path]:
    """Return the files of results in a checkpoint's folder, the oldest first."""
    return sorted((folder / EVALUATIONS).glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
