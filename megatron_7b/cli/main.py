"""`megatron-7b COMMAND …`: find the command, run it, turn errors that a user can fix into one clear message.

Exit codes: 0 finished, 75 saved and to be resumed, 2 a mistake in the command line or the configuration, 1 another
failure, 130 interrupted.
"""

import ast
import difflib
import errno
import importlib
import io
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from megatron_7b import __version__
from megatron_7b.errors import ConfigError, MegatronError, PathError, exit_code, is_path_error
from megatron_7b.runtime.process.launched import has_launcher, join_launcher, record_failure
from megatron_7b.runtime.process.terminal import finish_output, say

COMMANDS = {
    "look around": ("doctor", "config", "plan"),
    "text to tokens": ("tokenizer", "preprocess", "data"),
    "tokens to a model": ("pretrain", "finetune"),
    "how good it is": ("evaluate", "compare", "parity"),
    "model to text": ("convert", "compress", "generate", "predict", "serve"),
}
"""Commands by stage of the road, in its order; each is the module of that name in megatron_7b.cli.commands."""

_ROOM = {
    errno.ENOSPC: "free some room, and give the same command again",
    errno.EDQUOT: "free some of your quota, and give the same command again",
}
"""Errors of the file system that are not our defect, wherever they come up, and what to do."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments after the program's name; None takes those of the process.

    Returns:
        The exit code. Any other exception is our bug and keeps its traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # text in a script that the terminal's encoding lacks ends nothing
        sys.stdout.reconfigure(errors="backslashreplace")
    join_launcher()
    try:
        code = _exit_code(arguments)
    finally:
        finish_output()
    if argv is None and "RANK" in os.environ:
        _end_rank(code)
    return code


def _end_rank(code: int) -> NoReturn:
    """End the process of a rank at once, without the end of the interpreter.

    A thread of gloo's gives its last tensor back when the collective is long over. If the interpreter is ending by
    then, asking for its lock ends the thread inside a destructor, and so the process by SIGABRT: one of ten
    evaluations on two ranks did, after everything was printed.

    **Source:** torch 2.14, `ProcessGroupGloo::runLoop` and `TensorImpl::decref_pyobject`; CPython 3.12, `take_gil`.
    """
    logging.shutdown()
    os._exit(code)


def _exit_code(arguments: list[str]) -> int:
    try:
        return _run(arguments)
    except MegatronError as error:
        return _tell(error)
    except KeyboardInterrupt:
        if not has_launcher():
            say("interrupted")
        return 130
    except BrokenPipeError:  # The reader of our output left (`| head`); nothing more can be said there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if is_path_error(error):
            return _tell(PathError(str(error), hint="give a path that you may read and write"))
        if isinstance(error, OSError) and error.errno in _ROOM:
            return _tell(MegatronError(str(error), hint=_ROOM[error.errno]))
        if record_failure(error, 1):
            return 1
        if isinstance(error, OSError) and error.filename is not None:  # the machine's fault, and it says which file's
            say(f"error: {error.filename}: {error.strerror}")
            return 1
        raise


def _tell(error: MegatronError) -> int:
    """Print what a user can fix, or leave it to the launcher, and return the exit code."""
    code = exit_code(error)
    if not record_failure(error, code):
        say(f"error: {error}")
    return code


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"megatron-7b {__version__}")
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in _installed_commands():
        guess = difflib.get_close_matches(command, _installed_commands(), n=1)
        raise ConfigError(
            f"unknown command {command!r}" + (f"; did you mean {guess[0]}?" if guess else ""),
            hint="megatron-7b --help lists the commands",
        )
    module = importlib.import_module(f"megatron_7b.cli.commands.{command}")
    code: int = module.main(rest)
    sys.stdout.flush()  # A broken pipe shows here rather than at the interpreter's end.
    return code


def _overview() -> str:
    """Return the list of commands with their summaries."""
    lines = ["From raw text to a trained model and back to text.", "", "usage: megatron-7b COMMAND [options]", ""]
    for stage, commands in COMMANDS.items():
        installed = [command for command in commands if command in _installed_commands()]
        if installed:
            lines.append(f"{stage}:")
            lines += [f"  {command:<12}{_summary(command)}" for command in installed]
    lines += ["", "megatron-7b COMMAND --help shows a command's options with their defaults."]
    return "\n".join(lines)


def _installed_commands() -> list[str]:
    return [name for names in COMMANDS.values() for name in names if _module_file(name).is_file()]


def _module_file(command: str) -> Path:
    return Path(__file__).parent / "commands" / f"{command}.py"


def _summary(command: str) -> str:
    """Return a command's SUMMARY, read from its source: importing every command would make the overview slow."""
    for node in ast.parse(_module_file(command).read_text(encoding="utf-8")).body:
        match node:
            case ast.Assign(targets=[ast.Name(id="SUMMARY")], value=ast.Constant(value=str(summary))):
                return summary
            case ast.AnnAssign(target=ast.Name(id="SUMMARY"), value=ast.Constant(value=str(summary))):
                return summary
    return ""


if __name__ == "__main__":
    sys.exit(main())
