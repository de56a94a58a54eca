"""What transformers' AutoTokenizer makes of a folder, as a definition that the tokenizers library can run alone.

Which class AutoTokenizer takes, what that class rebuilds, and which of the files beside a vocabulary it believes
changes from one release of transformers to the next. So its answer is taken, not imitated. It is asked in a process of
its own, because transformers imports torch, for which the commands that read and write data have no use.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_7b.errors import DataFormatError
from megatron_7b.tokenizer.probes import build_text_probes

_ROLES = ("eos", "bos", "pad")
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A tokenizer as transformers builds it."""

    class_name: str
    """Its class, such as `Qwen2Tokenizer`."""
    definition: dict[str, Any]
    """As in a tokenizer.json."""
    eod_id: int | None
    bos_id: int | None
    pad_id: int | None
    split_special_tokens: bool
    """Text of a special token is spelled out."""


def ask_transformers(folder: Path) -> Answer:
    """Load a folder with AutoTokenizer, without a network and without running code that the folder brings.

    Raises:
        DataFormatError: Transformers is not installed, cannot load the folder, or takes a tokenizer that no
            tokenizer.json describes.
    """
    # Where a process has it at hand already, asking there saves starting another.
    answer = build_answer(folder) if "transformers" in sys.modules else _ask_in_a_process(folder)
    if (problem := answer.get("problem")) is not None:
        raise DataFormatError(f"transformers cannot load the tokenizer in {folder}: {problem}", hint=answer.get("hint"))
    return Answer(**answer)


def build_answer(folder: Path) -> dict[str, Any]:
    """Return the fields of an `Answer`, or `problem` in words, and perhaps a `hint`."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        return {"problem": f"it is not installed ({error})", "hint": "pip install transformers"}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return describe_auto_tokenizer(tokenizer)
    except Exception as error:  # noqa: BLE001  # whatever the class for a foreign folder raises
        return {"problem": f"{type(error).__name__}: {str(error).strip()}"}


def describe_auto_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """Take a loaded tokenizer apart, and check that its parts give the ids that it gives."""
    name = type(tokenizer).__name__
    if not getattr(tokenizer, "is_fast", False) or not hasattr(tokenizer, "backend_tokenizer"):
        return {"problem": f"its class {name} runs in Python, so that no tokenizer.json can replace it"}
    definition = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    split = bool(tokenizer.split_special_tokens)
    differing = _find_difference(tokenizer, definition, split_special_tokens=split)
    if differing is not None:
        return {"problem": f"its class {name} encodes {differing!r} otherwise than the tokenizer.json that it writes"}
    roles = {f"{'eod' if role == 'eos' else role}_id": _role_id(tokenizer, role) for role in _ROLES}
    return {"class_name": name, "definition": definition, "split_special_tokens": split, **roles}


def _role_id(tokenizer: Any, role: str) -> int | None:
    token = getattr(tokenizer, f"{role}_token_id")
    return None if token is None else int(token)


def _find_difference(tokenizer: Any, definition: Mapping[str, Any], *, split_special_tokens: bool) -> str | None:
    """Return the first probe that the tokenizer encodes otherwise than its definition does."""
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(json.dumps(definition))
    backend.encode_special_tokens = split_special_tokens
    for text in build_text_probes([str(token["content"]) for token in definition["added_tokens"]]):
        if (
            tokenizer.encode(text, add_special_tokens=False, verbose=False)
            != backend.encode(text, add_special_tokens=False).ids
        ):
            return text
    return None


def _ask_in_a_process(folder: Path) -> dict[str, Any]:
    package = str(Path(__file__).parents[2])
    search = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
    result = subprocess.run(
        [sys.executable, "-m", __name__, str(folder)],
        capture_output=True,
        check=False,
        env={**os.environ, **_OFFLINE, "PYTHONPATH": search},
    )
    if result.returncode != 0:
        message = result.stderr.decode(errors="replace").strip()
        return {"problem": message.rpartition("\n")[2] or f"it ended with exit code {result.returncode}"}
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def _main() -> None:
    """Print the answer for the folder on the command line, and nothing else that a library may print."""
    with contextlib.redirect_stdout(sys.stderr):
        answer = build_answer(Path(sys.argv[1]))
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    _main()
