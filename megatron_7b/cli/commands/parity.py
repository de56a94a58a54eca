"""`megatron-7b parity`: a few steps of a run at several layouts, compared parameter by parameter.

    megatron-7b parity --config X --layout "tp=2 pp=2" --layout "tp=1" --steps 5

The same initial weights and the same batches at each layout; losses, the gradient of every parameter, and the weights
after every update are compared with those at the layout with the fewest ranks. Ends with code 1 if something is further
apart than rounding, and says what was first. Without --data.train, the data is generated.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_7b.adapter import build_adapter
from megatron_7b.cli.options import CommandLine, Parser, add_config_flag, parse_arguments
from megatron_7b.cli.tables import align
from megatron_7b.config import RunConfig
from megatron_7b.errors import ConfigError
from megatron_7b.model.fitting import check_before_launch
from megatron_7b.model.sizes import count_parameters
from megatron_7b.runtime.process.launch import LaunchPlan, launch, megatron_command
from megatron_7b.training import load_run_config
from megatron_7b.training.equivalence import Comparison, NamedLayout, compare_recordings, read_layouts, record_steps
from megatron_7b.training.equivalence.comparing import BANDS, What
from megatron_7b.training.equivalence.generated import write_generated_corpus

SUMMARY = "check that a run computes the same at several layouts"

_DROPOUT = ("model.hidden_dropout", "model.attention_dropout", "adapter.dropout")


def main(argv: list[str]) -> int:
    """Run the command.

    Returns:
        0 when all layouts agree, 1 when they do not, the code of the ranks if they failed.

    Raises:
        ConfigError: A layout does not fit, before anything is started; all of them in one message.
    """
    command_line = parse_arguments(_parser(), argv)
    flags = command_line.flags
    if flags.steps < 1:
        raise ConfigError(f"--steps is {flags.steps}, expected at least 1")
    with contextlib.ExitStack() as stack:
        given = dict(command_line.overrides)
        if flags.record is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="parity.", dir=flags.folder)))
            given |= _generated(command_line, folder)
        layouts = _layouts(command_line, given)
        if flags.record is not None:
            (layout,) = [one for one in layouts if one.name == flags.only]
            record_steps(layout.config, flags.record, flags.steps)
            return 0
        _check_room(layouts, flags.steps, folder)
        for number, layout in enumerate(layouts):
            code = _record(argv, layout, folder / str(number), given)
            if code:
                print(f"layout {layout.name!r} failed", file=sys.stderr)
                return code
        return _compare(layouts, flags, folder)


def _parser() -> Parser:
    parser = Parser("parity", SUMMARY, with_config=True)
    add_config_flag(parser)
    parser.add_argument(
        "--layout", action="append", default=[], metavar="LAYOUT",
        help="such as 'tp=2 pp=2 sp'; knows tp, pp, vpp, cp, ep, dp, sp, zero1, overlap, recompute=full; at least two",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=5, help="updates to compare")
    parser.add_argument("--folder", type=Path, help="for what is recorded meanwhile; default: that of temporary files")
    parser.add_argument("--json", action="store_true", help="the last line of the output is one JSON object")
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)  # what a rank is told
    parser.add_argument("--only", help=argparse.SUPPRESS)
    return parser


def _layouts(command_line: CommandLine, given: Mapping[str, object]) -> list[NamedLayout]:
    """Return the layouts with the configuration of the run at each, checked."""
    for path in given:
        if path.startswith("parallel."):
            raise ConfigError(f"{path} is what layouts say", hint='--layout "tp=2 sp" --layout "tp=1"')

    def load(values: Mapping[str, object], world_size: int) -> RunConfig:
        config = load_run_config(
            command_line.flags.config,
            {**given, **values, **dict.fromkeys(_DROPOUT, 0.0)},  # masks are drawn by each rank for itself
            world_size=world_size, problems=command_line.problems,
        )  # fmt: skip
        precision = config.precision
        if precision.params_dtype == "auto":
            config = dataclasses.replace(config, precision=dataclasses.replace(precision, params_dtype="fp32"))
        ranks = range(world_size)
        check_before_launch(config, ranks=ranks, world_size=world_size, is_training=True, adapter=build_adapter(config))
        return config

    return read_layouts(command_line.flags.layout, load)


def _generated(command_line: CommandLine, folder: Path) -> dict[str, object]:
    """Return what makes the run read generated text, if it names no data of its own."""
    from megatron_7b.config import load_config

    config = load_config(command_line.flags.config, command_line.overrides, problems=command_line.problems)
    if config.data.train:
        return {}
    if config.objective_name != "causal":
        raise ConfigError(
            f"data.train is empty, and data is only generated for the objective causal, not {config.objective_name}",
            hint="--data.train PREFIX names a corpus",
        )
    return write_generated_corpus(folder / "generated", config)


def _check_room(layouts: list[NamedLayout], steps: int, folder: Path) -> None:
    """Refuse to record more than the disk can hold.

    Raises:
        ConfigError: It has too little room.
    """
    needed = 0
    for layout in layouts:
        copies = layout.world_size / layout.config.parallel.model_parallel_size
        copies *= layout.config.parallel.context_parallel_size
        needed += int(
            count_parameters(layout.config.model, vocab_size=layout.config.model.vocab_size or 2**16) * copies
        )
    needed *= 4 * (2 * steps + 1)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"gradients and weights of {steps} steps take {needed / 2**30:.1f} GiB, and {folder} has "
            f"{free / 2**30:.1f} GiB free",
            hint="--folder DIR is another place; --model.num-layers 2 shows the same in a small model",
        )


def _record(argv: list[str], layout: NamedLayout, folder: Path, given: Mapping[str, object]) -> int:
    folder.mkdir()
    (folder / "logs").mkdir()
    print(f"{layout.name}: {layout.world_size} rank{'s' if layout.world_size > 1 else ''}", file=sys.stderr, flush=True)
    generated = [
        word
        for path, value in given.items()
        if f"--{_flag(path)}" not in argv
        for word in (f"--{_flag(path)}", *(map(str, value) if isinstance(value, list) else [str(value)]))
    ]
    words = ["parity", *argv, *generated, "--record", str(folder), "--only", layout.name]
    plan = LaunchPlan(
        num_local_ranks=layout.world_size, num_threads=layout.config.runtime.num_threads, log_folder=folder / "logs"
    )
    return launch(megatron_command(words), plan)


def _flag(path: str) -> str:
    return path.replace("_", "-")


def _compare(layouts: list[NamedLayout], flags: argparse.Namespace, folder: Path) -> int:
    """Compare all layouts with the first one, print, and return the exit code."""
    reference, *others = layouts
    number_format = reference.config.precision.params_dtype
    found: list[tuple[NamedLayout, Comparison]] = []
    for number, layout in enumerate(others, start=1):
        compared = compare_recordings(
            folder / "0", folder / str(number), flags.steps, reference_ranks=reference.world_size,
            other_ranks=layout.world_size, band=BANDS[number_format],
        )  # fmt: skip
        found.append((layout, compared))
    print(f"{flags.steps} steps in {number_format.upper()}, beside {reference.name!r}; largest relative distances:")
    kinds: tuple[What, ...] = ("loss", "gradient norm", "gradient", "weight")
    band = BANDS[number_format]
    rows = [["layout", *kinds, "result"]]
    for layout, compared in found:
        cells = [f"{compared.largest[kind].distance:.1e}" for kind in kinds]
        rows.append([layout.name, *cells, "agrees" if compared.agrees else "parts"])
    rows.append(["allowed", *(f"{band.of(kind):.0e}" for kind in kinds), ""])
    print("\n".join(align(rows, num_left=1)))
    for layout, compared in found:
        if compared.first is not None:
            print(f"{layout.name!r} parts from {reference.name!r} at {compared.first}")
            if compared.first_parameter not in (None, compared.first):
                print(f"  the first parameter: {compared.first_parameter}")
            for one in compared.others:
                print(f"  farthest: {one}")
    agrees = all(compared.agrees for _, compared in found)
    if flags.json:
        print(json.dumps(_as_json(reference, number_format, found, agrees=agrees, steps=flags.steps)))
    return 0 if agrees else 1


def _as_json(
    reference: NamedLayout,
    number_format: str,
    found: list[tuple[NamedLayout, Comparison]],
    *,
    agrees: bool,
    steps: int,
) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        fields = dataclasses.asdict(value)
        return {**fields, "distance": value.distance if math.isfinite(value.distance) else None}

    return {
        "agrees": agrees,
        "steps": steps,
        "precision": number_format,
        "reference": reference.name,
        "layouts": [
            {
                "layout": layout.name,
                "agrees": compared.agrees,
                "largest": {kind: plain(one) for kind, one in compared.largest.items()},
                "first": plain(compared.first) if compared.first else None,
                "first_parameter": plain(compared.first_parameter) if compared.first_parameter else None,
                "others": [plain(one) for one in compared.others],
            }
            for layout, compared in found
        ],
    }
