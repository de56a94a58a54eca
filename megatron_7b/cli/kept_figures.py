"""`--keep` of `megatron-7b evaluate`: what was found stays in the checkpoint, for the model card of its export."""

import argparse
import json
import math
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_7b.checkpoint.evaluations import evaluation_file, with_weights
from megatron_7b.cli.options import Parser
from megatron_7b.runtime.rescue import write_or_rescue

type Figures = Mapping[str, float | int | None]


def add_keep_flag(parser: Parser) -> None:
    """Add `--keep`, which goes with every kind of measuring."""
    parser.add_argument(
        "--keep", action="store_true", help="keep what was found in the checkpoint, for the model card of an export"
    )


def check_can_keep(flags: argparse.Namespace, folder: Path) -> None:
    """Refuse `--keep` for a checkpoint whose folder takes no results.

    Raises:
        ConfigError: It cannot be written to.
    """
    if flags.keep:
        evaluation_file(folder, "any")


def keep_figures(
    folder: Path,
    kind: str,
    found: Mapping[str, Figures],
    argv: Sequence[str],
    *,
    counts: Sequence[str] = (),
) -> None:
    """Keep figures in a checkpoint, in the form of results of tasks, and say where; on the main rank only.

    Args:
        folder: The checkpoint.
        kind: What kind of measuring it was: `corpus`.
        found: Of each file or corpus, by its path, the figures by name; what is None or infinite is left out.
        argv: Arguments of the command.
        counts: Figures that only say how much was measured, which a model card leaves out.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    names = short_names(list(found))
    by_name = dict(zip(names, found.values(), strict=True))
    content = {
        "results": {
            name: {
                f"{measure},none": value
                for measure, value in figures.items()
                if measure not in counts and value is not None and math.isfinite(value)
            }
            for name, figures in by_name.items()
        },
        "counts": {name: {one: figures[one] for one in counts} for name, figures in by_name.items()},
        "date": time.time(),
        "command": command_of(argv),
    }
    keep(folder, f"{kind}-{'+'.join(names)}", with_weights(content, folder))


def keep(folder: Path, name: str, content: Mapping[str, Any]) -> None:
    """Keep the content of a file of results in a checkpoint, and say where."""
    kept = evaluation_file(folder, name)
    text = json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n"
    write_or_rescue(kept, lambda stream: stream.write(text))
    print(f"kept in {kept}, from where `convert to-hf` puts it into the model card")


def command_of(argv: Sequence[str]) -> str:
    """Return the command as one would type it."""
    return shlex.join(["megatron-7b", "evaluate", *argv])


def short_names(paths: Sequence[str]) -> list[str]:
    """Return the names of files without their folders, where these are different; otherwise as they are."""
    names = [Path(path).name for path in paths]
    return names if len(set(names)) == len(names) else list(paths)
