"""`--config auto`: the layout of a run is chosen for this machine, unless the command line says it."""

import dataclasses
from pathlib import Path

from megatron_7b.cli.options import CommandLine, split_overrides
from megatron_7b.cli.planned_run import model_of, planned_config
from megatron_7b.cli.ranks import given_world_size
from megatron_7b.config.options import command_words
from megatron_7b.objective import build_objective
from megatron_7b.planning import AUTO, choose_layout
from megatron_7b.planning.layouts import CHOSEN
from megatron_7b.runtime.process.launch import is_rank
from megatron_7b.runtime.process.terminal import say


def with_layout(command_line: CommandLine, argv: list[str]) -> tuple[CommandLine, list[str]]:
    """Return the command line with what `auto` among the values of `--config` stands for.

    Presets and files give the run; of them, the options of the layout do not count. Those of the command line do, and
    so does `--nproc`.

    Args:
        command_line: As it was read.
        argv: Its arguments, which ranks get as well: `auto` is replaced in them, so that all ranks have one choice.

    Raises:
        ConfigError: Nothing fits on this machine, or the configuration is impossible.
    """
    flags = command_line.flags
    if AUTO not in flags.config:
        return command_line, argv
    flags.config = [name for name in flags.config if name != AUTO]
    config = planned_config(command_line)
    teacher = config.distillation.teacher
    choice = choose_layout(
        config,
        world_size=given_world_size(flags),
        given=set(CHOSEN) & command_line.overrides.keys(),
        predicted_share=build_objective(config).predicted_share(config),
        teacher=None if teacher is None else model_of(Path(teacher)),
        is_starting=not is_rank(),
    )
    if not is_rank():
        say(f"layout    {choice.summary}")
    chosen = {path: value for path, value in choice.settings.items() if path not in command_line.overrides}
    flags_and_values = {path: command_words(path, value) for path, value in chosen.items()}
    words = [word for one in flags_and_values.values() for word in one]
    if not is_rank() and flags.nproc is None:
        flags.nproc = choice.world_size // flags.nnodes
        words += ["--nproc", str(flags.nproc)]
    given, _, _ = split_overrides([word for one in flags_and_values.values() for word in one])
    overrides = {**command_line.overrides, **given}
    return dataclasses.replace(command_line, overrides=overrides), [*_without_auto(argv), *words]


def _without_auto(argv: list[str]) -> list[str]:
    """Return the arguments without the value `auto` of `--config`, and without a `--config` that is left empty."""
    kept: list[str] = []
    is_config = False
    for word in argv:
        if word.startswith("-"):
            is_config = word == "--config"
            if word == f"--config={AUTO}":
                continue
        elif is_config and word == AUTO:
            continue
        kept.append(word)
    return [
        word
        for word, following in zip(kept, [*kept[1:], "--"], strict=True)
        if word != "--config" or not following.startswith("-")
    ]
