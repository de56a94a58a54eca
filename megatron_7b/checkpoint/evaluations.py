"""What was measured on a checkpoint, kept in its own folder: STEP/evaluations/*.json.

Each file says on which weights it was measured, so that it is never taken for what others can do.
"""

import hashlib
import os
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
_LONGEST_NAME = 50
"""Characters; file systems take 255 bytes, of which a character of UTF-8 may be four."""
_HINT = "leave out --keep: results are printed in any case, as JSON with --json"


def evaluation_file(folder: Path, name: str) -> Path:
    """Return where the results of an evaluation are kept, and make the folder.

    Args:
        folder: The checkpoint.
        name: What was measured; the same name replaces the file.

    Raises:
        ConfigError: The checkpoint's folder cannot be written to.
    """
    plain = re.sub(r"[^\w.+-]+", "_", name)
    if len(plain) > _LONGEST_NAME:  # two that begin alike stay apart
        plain = f"{plain[:_LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    home = folder / EVALUATIONS
    try:
        home.mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{home} cannot be made: {error.strerror}", hint=_HINT) from error
    if not os.access(home, os.W_OK | os.X_OK):
        raise ConfigError(f"{home} cannot be written to", hint=_HINT)
    return home / f"{plain}.json"


def with_weights(content: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return results that say on which weights they were measured."""
    return {**content, WEIGHTS: weights_identity(read_manifest(folder))}


def kept_evaluations(folder: Path) -> list[Path]:
    """Return the files of results in a checkpoint's folder, the oldest first."""
    return sorted((folder / EVALUATIONS).glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
