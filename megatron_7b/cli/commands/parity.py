"""`megatron-7b parity`: a few steps of a run at several layouts, compared parameter by parameter.

    megatron-7b parity --config X --layout "tp=2 pp=2" --layout "tp=1" --steps 5

The same initial weights and the same batches at each layout; losses, the gradient of every parameter, and the weights
after every update are compared with those at the layout with the fewest ranks. Ends with code 1 if something is further
apart than rounding, and says what was first. In BF16, that layout is computed in FP32 as well, and none of the others
may be much further from this than it is itself. Without --data.train, the data is generated.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from megatron_7b.adapter import build_adapter
from megatron_7b.cli.options import CommandLine, Parser, add_config_flag, parse_arguments
from megatron_7b.cli.tables import align
from megatron_7b.config import RunConfig
from megatron_7b.errors import ConfigError
from megatron_7b.model.fitting import check_before_launch
from megatron_7b.model.sizes import count_parameters
from megatron_7b.runtime.process.launch import LaunchPlan, launch, megatron_command
from megatron_7b.runtime.process.signals import heeded_signals
from megatron_7b.training import load_run_config
from megatron_7b.training.equivalence import (
    FP32,
    OPTIONS,
    Band,
    Comparison,
    Deviation,
    NamedLayout,
    compare_recordings,
    in_fp32,
    measure_rounding,
    read_layouts,
    record_steps,
)
from megatron_7b.training.equivalence.comparing import TIMES_ITS_ERROR, What
from megatron_7b.training.equivalence.generated import write_generated_corpus

SUMMARY = "check that a run computes the same at several layouts"

_KINDS: tuple[What, ...] = ("loss", "gradient norm", "gradient", "weight")
_EXACT = "exact"
"""What is recorded in FP32 beside a comparison in another number format."""
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
    if flags.folder is not None and not flags.folder.is_dir():
        raise ConfigError(f"--folder is {flags.folder}, expected a folder that is there")
    with contextlib.ExitStack() as stack:
        given = dict(command_line.overrides)
        if flags.record is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="parity.", dir=flags.folder)))
            given |= _generated(command_line, folder)
        layouts = _layouts(command_line, given)
        if flags.record is not None:
            _record_own(layouts, flags.record, flags.steps)
            return 0
        _check_room(layouts, flags.steps, folder.parent)
        for number in range(len(layouts)):
            (folder / str(number)).mkdir()
        (folder / _EXACT).mkdir()
        for world_size in sorted({layout.world_size for layout in layouts}):
            threads = layouts[0].config.runtime.num_threads
            code = _start_ranks(argv, folder, given, world_size=world_size, num_threads=threads)
            if code:
                return code
        return _compare(layouts, flags, folder)


def _parser() -> Parser:
    parser = Parser("parity", SUMMARY, with_config=True)
    add_config_flag(parser)
    parser.add_argument(
        "--layout", action="append", default=[], metavar="LAYOUT",
        help="such as 'tp=2 pp=2 sp'; knows tp, pp, vpp, stages=3+1, cp, ep, dp, sp, zero1, overlap, recompute=full; "
        "at least two",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=5, help="updates to compare")
    parser.add_argument("--folder", type=Path, help="for what is recorded meanwhile; default: that of temporary files")
    parser.add_argument("--json", action="store_true", help="the last line of the output is one JSON object")
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)  # what a rank is told
    return parser


def _layouts(command_line: CommandLine, given: Mapping[str, object]) -> list[NamedLayout]:
    """Return the layouts with the configuration of the run at each, checked."""
    for path in given:
        if path in OPTIONS:
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
    for layout in (*layouts, *(layouts[:1] if _rounds(layouts[0]) else ())):
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


def _rounds(layout: NamedLayout) -> bool:
    """Return whether the run computes in a number format shorter than FP32."""
    return layout.config.precision.params_dtype != "fp32"


def _record_own(layouts: list[NamedLayout], folder: Path, steps: int) -> None:
    """Record the layouts of as many ranks as there are here, one after another.

    Collective: all ranks of the launcher's world.
    """
    ranks = int(os.environ["WORLD_SIZE"])
    is_main = os.environ["RANK"] == "0"
    for number, layout in enumerate(layouts):
        if layout.world_size != ranks:
            continue
        said = f"{layout.name}: {ranks} rank{'s' if ranks > 1 else ''}"
        if number == 0 and _rounds(layout):
            if is_main:
                print(f"{said} in FP32", file=sys.stderr, flush=True)
            record_steps(in_fp32(layout.config), folder / _EXACT, steps, from_rounded=True)
        if is_main:
            print(said, file=sys.stderr, flush=True)
        record_steps(layout.config, folder / str(number), steps)


def _start_ranks(
    argv: list[str], folder: Path, given: Mapping[str, object], *, world_size: int, num_threads: int | None
) -> int:
    """Have the layouts of so many ranks recorded: each process takes them all, as starting one takes seconds.

    What ranks have said stays if they fail, as the message about it names the place.
    """
    logs = Path(tempfile.mkdtemp(prefix="parity.logs.", dir=folder.parent))
    generated = [
        word
        for path, value in given.items()
        if f"--{_flag(path)}" not in argv
        for word in (f"--{_flag(path)}", *(map(str, value) if isinstance(value, list) else [str(value)]))
    ]
    words = ["parity", *argv, *generated, "--record", str(folder)]
    plan = LaunchPlan(num_local_ranks=world_size, num_threads=num_threads, log_folder=logs)
    code = launch(megatron_command(words), plan)
    if code in (0, *(128 + signal for signal in heeded_signals())) or not any(logs.iterdir()):
        shutil.rmtree(logs)
    return code


def _flag(path: str) -> str:
    return path.replace("_", "-")


def _compare(layouts: list[NamedLayout], flags: argparse.Namespace, folder: Path) -> int:
    """Compare all layouts with the first one, print, and return the exit code."""
    reference = layouts[0]
    beside, band, compared = folder / "0", cast(Band, FP32), list(enumerate(layouts))[1:]
    if _rounds(reference):
        beside, compared = folder / _EXACT, list(enumerate(layouts))
        band = measure_rounding(beside, folder / "0", flags.steps, num_ranks=reference.world_size)
    found = [
        (
            layout,
            compare_recordings(
                beside, folder / str(number), flags.steps, reference_ranks=reference.world_size,
                other_ranks=layout.world_size, band=band,
            ),
        )
        for number, layout in compared
    ]  # fmt: skip
    print("\n".join(_table(reference, found, flags.steps)))
    for layout, comparison in found:
        if comparison.first is not None:
            print(f"{layout.name!r} parts from {reference.name!r} at {comparison.first}")
            if comparison.first_parameter not in (None, comparison.first):
                print(f"  the first parameter: {comparison.first_parameter}")
            for one in comparison.others:
                print(f"  farthest: {one}")
    agrees = all(comparison.agrees for _, comparison in found)
    if flags.json:
        print(json.dumps(_as_json(reference, found, agrees=agrees, steps=flags.steps)))
    return 0 if agrees else 1


def _table(reference: NamedLayout, found: list[tuple[NamedLayout, Comparison]], steps: int) -> list[str]:
    """Return the lines of the comparison: the largest distances, and what was allowed."""
    rounds, number_format = _rounds(reference), reference.config.precision.params_dtype.upper()
    rows = [["layout", *_KINDS, *(["of its error"] if rounds else []), "result"]]
    for layout, comparison in found:
        cells = [f"{comparison.largest[kind].distance:.1e}" for kind in _KINDS]
        if rounds:  # the nearest to its bound, as a multiple of the reference's own error
            cells.append(f"{_times_error(comparison):.2f}")
        rows.append([layout.name, *cells, "agrees" if comparison.agrees else "parts"])
    if rounds:
        rows.append(["allowed", *("" for _ in _KINDS), f"{TIMES_ITS_ERROR:.2f}", ""])
        title = f"{steps} steps in {number_format}, beside {reference.name!r} in FP32; largest relative distances:"
    else:
        rows.append(["allowed", *(f"{FP32.of(1, kind, ''):.0e}" for kind in _KINDS), ""])
        title = f"{steps} steps in {number_format}, beside {reference.name!r}; largest relative distances:"
    return [title, *align(rows, num_left=1)]


def _times_error(comparison: Comparison) -> float:
    """Return the most that a figure is away from exact ones, as a multiple of what the reference is."""
    return comparison.nearest_to_bound.share_of_bound * TIMES_ITS_ERROR


def _as_json(
    reference: NamedLayout, found: list[tuple[NamedLayout, Comparison]], *, agrees: bool, steps: int
) -> dict[str, Any]:
    def plain(value: Deviation) -> Any:
        fields = dataclasses.asdict(value)
        numbers = {key: fields[key] if math.isfinite(fields[key]) else None for key in ("distance", "bound")}
        return {**fields, **numbers}

    return {
        "agrees": agrees,
        "steps": steps,
        "precision": reference.config.precision.params_dtype,
        "reference": reference.name,
        "layouts": [
            {
                "layout": layout.name,
                "agrees": compared.agrees,
                "largest": {kind: plain(one) for kind, one in compared.largest.items()},
                "times_error": _times_error(compared) if _rounds(reference) else None,
                "nearest_to_bound": plain(compared.nearest_to_bound),
                "first": plain(compared.first) if compared.first else None,
                "first_parameter": plain(compared.first_parameter) if compared.first_parameter else None,
                "others": [plain(one) for one in compared.others],
            }
            for layout, compared in found
        ],
    }
