"""From a command's arguments to its own flags and to overrides of the configuration.

Flags with a dot (`--section.field-name value`) belong to the configuration and are the same for every command; all
others are the command's own, declared with argparse. Texts stay texts here: `megatron_7b.config` gives them their
types, so that the command line and YAML are read by the same code.
"""

import argparse
import dataclasses
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

from megatron_7b.config import RunConfig, load_config
from megatron_7b.config.options import get_value, options, sections
from megatron_7b.config.problems import NOT_GIVEN, Problem, nearest, nearest_path, raise_problems, shown
from megatron_7b.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose mistakes are ConfigErrors and whose help shows defaults."""

    def __init__(
        self,
        command: str,
        summary: str,
        *,
        with_config: bool = False,
        root: type = RunConfig,
        load: Callable[[Sequence[str]], object] = load_config,
    ) -> None:
        super().__init__(
            prog=f"megatron-7b {command}",
            description=summary,
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            usage=f"megatron-7b {command} [options] [--section.field-name value …]" if with_config else None,
        )
        self.with_config = with_config
        """Whether the command takes flags of the configuration."""
        self.root = root
        """The dataclass of sections that these flags fill."""
        self.load = load
        """Builds it from the values of `--config`."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse for a missing or malformed flag."""
        raise ConfigError(f"{self.prog}: {message}", hint=f"{self.prog} --help lists the options")


@dataclass(frozen=True)
class CommandLine:
    """What a user asked for."""

    flags: argparse.Namespace
    """The command's own flags."""
    overrides: dict[str, object]
    """Texts, or lists of texts, by dotted path of the configuration."""
    problems: list[Problem]
    """Arguments that mean nothing; pass them to `load_config`, which reports them with everything else."""


def parse_arguments(parser: Parser, argv: Sequence[str]) -> CommandLine:
    """Split `argv` into the command's own flags and overrides of the configuration, or print the help.

    Raises:
        ConfigError: A flag of the command is missing or malformed, or, for a command without configuration, unknown.
        SystemExit: With code 0, after the help.
    """
    if "--help" in argv or "-h" in argv:
        print_help(parser, argv)
        raise SystemExit(0)
    overrides, rest, problems = split_overrides(argv, parser.root) if parser.with_config else ({}, list(argv), [])
    flags, unknown = parser.parse_known_args(rest)
    problems += _unknown_arguments(parser, unknown)
    if not parser.with_config:
        raise_problems(problems)
    return CommandLine(flags, overrides, problems)


def split_overrides(argv: Sequence[str], root: type = RunConfig) -> tuple[dict[str, object], list[str], list[Problem]]:
    """Take the flags with a dot out of `argv`; `root` is the schema that they belong to.

    Returns:
        Values by dotted path (a text, or a list of texts where the option takes several), the other arguments in their
        order, and a problem for each flag without a value.
    """
    overrides: dict[str, object] = {}
    rest: list[str] = []
    problems: list[Problem] = []
    position = 0
    while position < len(argv):
        name, has_value, value = argv[position].partition("=")
        position += 1
        if not (name.startswith("--") and "." in name):
            rest.append(argv[position - 1])
            continue
        path = name[2:].replace("-", "_")
        option = options(root).get(path)
        values = [value] if has_value else []
        limit = 1 if option and not option.takes_many else len(argv)
        while not has_value and len(values) < limit and position < len(argv) and not argv[position].startswith("--"):
            values.append(argv[position])
            position += 1
        if not values:
            message = f"needs a value: {option.allowed}" if option else "unknown option without a value"
            guess = None if option else nearest_path(path, list(options(root)))
            problems.append(
                Problem(path, None, message + (f"; did you mean {guess}?" if guess else ""), "command line")
            )
        else:
            overrides[path] = values if (option and option.takes_many) or len(values) > 1 else values[0]
    return overrides, rest, problems


def print_help(parser: Parser, argv: Sequence[str]) -> None:
    """Print the command's flags and, where it takes them, all options of the configuration with their defaults.

    With `--config X` in `argv`, the values of X are shown instead of the defaults.
    """
    lines = [parser.format_help()]
    if parser.with_config:
        sources = _config_sources(argv)
        title = f"with the values of {' '.join(sources)}" if sources else "with their defaults"
        presets = "; `megatron-7b config list` shows the presets" if parser.root is RunConfig else ""
        lines += [f"configuration, {title}{presets}:", ""]
        lines += _describe_options(parser.load(sources))
    sys.stdout.write("\n".join(lines) + "\n")


def add_config_flag(parser: Parser) -> None:
    """Declare `--config`."""
    what = "preset or YAML file" if parser.root is RunConfig else "YAML file"
    parser.add_argument(
        "--config",
        nargs="+",
        default=[],
        metavar="NAME|FILE" if parser.root is RunConfig else "FILE",
        help=f"{what}; of several, the later ones win",
    )


def _config_sources(argv: Sequence[str]) -> list[str]:
    """Return the values of `--config`, found without the rest having to be right."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config", nargs="*", default=[])
    sources = finder.parse_known_args([argument for argument in argv if argument not in ("-h", "--help")])[0].config
    return [source for source in sources if source != "auto"]  # which stands for a layout, not for a file


def _describe_options(config: object) -> Iterator[str]:
    """Yield lines of help: every option of the schema that `config` is of, with its value there."""
    root: type = type(config)
    width = min(shutil.get_terminal_size().columns, 120)
    for section, summary in sections(root).items():
        yield f"{section}: {summary}"
        for option in options(root).values():
            if option.path.startswith(f"{section}."):
                value = get_value(config, option.path)
                written = "{}" if dataclasses.is_dataclass(value) else shown(value)
                yield f"  {option.flag} {option.metavar}  (default: {written})"
                if option.doc:
                    yield textwrap.indent(textwrap.fill(option.doc, width - 6, break_on_hyphens=False), " " * 6)
        yield ""


def _unknown_arguments(parser: Parser, unknown: Sequence[str]) -> list[Problem]:
    flags = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
    problems: list[Problem] = []
    for position, argument in enumerate(unknown):
        if not argument.startswith("-"):
            if position == 0 or not unknown[position - 1].startswith("-"):
                problems.append(Problem(argument, NOT_GIVEN, "unexpected argument", "command line"))
            continue  # Otherwise it is the value of the unknown flag before it.
        name, has_value, value = argument.partition("=")
        following = unknown[position + 1 : position + 2]
        if not has_value and following and not following[0].startswith("-"):
            has_value, value = "=", following[0]
        guess = nearest(name, flags)
        if guess is None and parser.with_config:
            path = nearest_path(name.lstrip("-").replace("-", "_"), list(options(parser.root)))
            guess = options(parser.root)[path].flag if path else None
        message = f"unknown flag; did you mean {guess}?" if guess else f"unknown flag; see {parser.prog} --help"
        problems.append(Problem(name, value if has_value else NOT_GIVEN, message, "command line"))
    return problems
