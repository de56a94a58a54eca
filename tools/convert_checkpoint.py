#!/usr/bin/env python3
"""Checkpoints to Hugging Face folders and back: the same as `megatron-7b convert`; see --help."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
INTERPRETER = REPOSITORY / ".venv" / "bin" / "python"

if __name__ == "__main__":
    # Started by an interpreter that lacks what is needed: start again in the environment that `make setup` made.
    if INTERPRETER.exists() and (sys.version_info < (3, 12) or find_spec("safetensors") is None):
        os.execv(INTERPRETER, [str(INTERPRETER), *sys.argv])
    sys.path.insert(0, str(REPOSITORY))
    from megatron_7b.cli.main import main

    sys.exit(main(["convert", *sys.argv[1:]]))
