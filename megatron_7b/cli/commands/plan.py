"""`megatron-7b plan`: will a run fit, how fast will it be, and which layout is best, before any GPU is touched.

    megatron-7b plan --config llama2_7b --gpus 8 --gpu h100
    megatron-7b plan --config qwen2_5_7b --gpus 64 --gpu h200 --data.seq-length 8192 --page plan.html

Model, batch and number formats are those of the configuration; layouts are looked for, within what the command line
fixes (`--parallel.tensor-model-parallel-size 2`). With `--checkpoint.initialize-from C` the model is that of a
checkpoint or of a Hugging Face folder. Imports no torch.
"""

import argparse
import dataclasses
import json
import math
import shlex
import sys
from pathlib import Path

from megatron_7b.cli.options import CommandLine, Parser, add_config_flag, parse_arguments
from megatron_7b.cli.plan_tables import print_plan, print_scaling, run_words
from megatron_7b.cli.planned_run import model_of, planned_config
from megatron_7b.config.schema import ModelConfig
from megatron_7b.errors import ConfigError
from megatron_7b.objective import build_objective
from megatron_7b.planning import NAMES, Device, Plan, plan, what_would_fit
from megatron_7b.planning.devices import find_device
from megatron_7b.planning.layouts import CHOSEN, FORMATS
from megatron_7b.planning.page import write_page
from megatron_7b.planning.scaling import scale
from megatron_7b.runtime.output_paths import check_file_to_write

_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")

SUMMARY = "see whether a run fits on some GPUs, how fast it is, and which layout is best"


def main(argv: list[str]) -> int:
    """Run the command.

    Returns:
        0 if the run fits at some layout, 1 if at none.

    Raises:
        ConfigError: A flag or the configuration is wrong, or no layout divides the run among so many GPUs.
    """
    command_line = parse_arguments(_parser(), argv)
    flags = command_line.flags
    if flags.page is not None:
        check_file_to_write(flags.page, "--page")
    _check_flags(flags)
    config, notes = planned_config(command_line), []
    if config.finetune.task is not None and config.checkpoint.initialize_from is None:
        said = "the model of a fine-tuning is that of its weights"
        if all(getattr(config.model, size) == getattr(ModelConfig(), size) for size in _SIZES):
            raise ConfigError(f"{said}, and none are named", hint="--checkpoint.initialize-from C, or a HF folder")
        notes.append(f"{said}: name them, --checkpoint.initialize-from C")
    given = {*CHOSEN, *FORMATS} & command_line.overrides.keys()
    share = build_objective(config).predicted_share(config)
    teacher = config.distillation.teacher
    teaching = None if teacher is None else model_of(Path(teacher))
    if flags.scaling:
        rows = scale(
            config,
            flags.scaling,
            device=lambda gpus: _device(command_line, gpus),
            given=given,
            share=share,
            teacher=teaching,
        )
        if flags.json:
            print(json.dumps([row.as_dict() for row in rows]))
        else:
            print_scaling(rows, config)
        return 0 if any(row.same_batch is not None for row in rows) else 1
    device = _device(command_line, flags.gpus)
    found = plan(
        config, gpus=flags.gpus, gpu=device, given=given, predicted_share=share, teacher=teaching, limit=flags.top
    )
    advice = [] if found.fits else what_would_fit(
        config, gpus=flags.gpus, device=device, given=given, predicted_share=share, teacher=teaching
    )  # fmt: skip
    found = dataclasses.replace(found, notes=(*notes, *found.notes))
    if flags.page is not None:
        write_page(flags.page, found, advice, shlex.join(run_words(found, argv)))
    if flags.json:
        print(json.dumps(_as_json(found, [one.change for one in advice])))
    else:
        print_plan(found, advice, argv)
        if flags.page is not None:
            print(f"\npage: {flags.page}")
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    return 0 if found.fits else 1


def _parser() -> Parser:
    parser = Parser("plan", SUMMARY, with_config=True)
    add_config_flag(parser)
    parser.add_argument("--gpus", type=int, default=8, help="ranks, one per GPU")
    parser.add_argument("--gpu", default="h100", metavar="NAME", help=f"{', '.join(NAMES)}")
    parser.add_argument("--gpus-per-node", type=int, help="default: that of the GPU's usual machine")
    parser.add_argument("--gpu-memory", type=float, metavar="GB", help="of each GPU, in place of its usual one")
    parser.add_argument("--link", type=float, metavar="GB/S", help="in each direction between GPUs of a node")
    parser.add_argument("--network", type=float, metavar="GB/S", help="in each direction per GPU, between nodes")
    parser.add_argument("--top", type=int, default=8, help="layouts to show")
    parser.add_argument(
        "--scaling", type=int, nargs="+", metavar="GPUS", help="first choices for these numbers of GPUs"
    )
    parser.add_argument("--page", type=Path, metavar="FILE", help="write a page with pictures (html)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _check_flags(flags: argparse.Namespace) -> None:
    for name, numbers in (("top", [flags.top]), ("gpus", [flags.gpus]), ("scaling", flags.scaling or [])):
        for number in numbers:
            if number < 1:
                raise ConfigError(f"--{name} is {number}, expected at least 1")
    if flags.scaling and flags.page is not None:
        raise ConfigError(
            "--page shows one number of GPUs, and --scaling asks for several", hint="leave one of them out"
        )


def _device(command_line: CommandLine, gpus: int) -> Device:
    """Return the device that the flags describe."""
    flags = command_line.flags
    device = find_device(flags.gpu, gpus)
    changes: dict[str, float] = {}
    for name, field, unit in (
        ("gpus_per_node", "node_size", 1),
        ("gpu_memory", "memory_bytes", 1e9),
        ("link", "link_bandwidth", 1e9),
        ("network", "network_bandwidth", 1e9),
    ):
        value = getattr(flags, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')} is {value:g}, expected a number above 0")
        if value is not None:
            changes[field] = int(value * unit)
    return dataclasses.replace(device, **changes)  # type: ignore[arg-type]


def _as_json(found: Plan, advice: list[str]) -> dict[str, object]:
    """Return the contract's object: the first choice, then all candidates; if nothing fits, the smallest."""
    first, *_ = found.candidates
    return {
        **first.as_dict(),
        "gpu": found.device.name,
        "gpus": found.world_size,
        "options": first.settings(),
        "candidates": [candidate.as_dict() for candidate in found.candidates],
        "configured": found.configured.as_dict() if found.configured is not None else None,
        "advice": advice,
        "notes": list(found.notes),
    }
