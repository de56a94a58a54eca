"""Commands of megatron-7b under the names of Megatron's scripts, in the environment that `make setup` made."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

REPOSITORY = Path(__file__).resolve().parent.parent
INTERPRETER = REPOSITORY / ".venv" / "bin" / "python"


def run_command(command: str, library: str) -> NoReturn:
    """Run `megatron-7b COMMAND` with the arguments of this process, and leave.

    Args:
        command: The command.
        library: What it needs. An interpreter that lacks it is replaced by that of the environment.
    """
    if INTERPRETER.exists() and (sys.version_info < (3, 12) or find_spec(library) is None):
        os.execv(INTERPRETER, [str(INTERPRETER), *sys.argv])
    sys.path.insert(0, str(REPOSITORY))
    from megatron_7b.cli.main import main

    sys.exit(main([command, *sys.argv[1:]]))
