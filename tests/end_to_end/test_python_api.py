"""The story of docs/python_api.md runs as it is printed, on one rank and on two, and its table names what there is."""

import ast
import contextlib
import importlib
import inspect
import io
import os
import re
import traceback
from pathlib import Path

import pytest

from tests.support.assets import REPOSITORY, asset
from tests.support.fork_server import fork_server

PAGE = REPOSITORY / "docs" / "python_api.md"
DOCUMENTS = 12


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def run(folder: str, output: str) -> None:
    """Run all blocks one after the other in a folder; one that begins with a file's name is written there."""
    os.chdir(folder)
    os.environ.update(PYTHONPATH=str(REPOSITORY), HF_HUB_OFFLINE="1")
    names: dict[str, object] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            for block in blocks():
                if file := re.match(r"# (\w+\.py)\n", block):
                    Path(file[1]).write_text(block, encoding="utf-8")
                else:
                    exec(compile(block, str(PAGE), "exec"), names)
        except BaseException:
            printed.write(traceback.format_exc())
    Path(output).write_text(printed.getvalue(), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_story_runs(tmp_path: Path) -> None:
    speeches = asset("sotu.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:DOCUMENTS]
    (tmp_path / "sotu.jsonl").write_text("".join(speeches), encoding="utf-8")
    process = fork_server().Process(target=run, args=(str(tmp_path), str(tmp_path / "printed")))
    process.start()
    process.join()
    printed = (tmp_path / "printed").read_text(encoding="utf-8")
    assert "Traceback" not in printed, printed
    assert printed.startswith(f"{DOCUMENTS} documents, ")
    assert re.search(r"epochs\nloss \d\.\d{3}, perplexity", printed), printed
    assert (tmp_path / "hf" / "model.safetensors").is_file()
    assert (tmp_path / "runs" / "second" / "checkpoints" / "step_00000005" / "checkpoint.json").is_file()


def test_every_door_exists() -> None:
    table = PAGE.read_text(encoding="utf-8").split("## Doors")[1]
    doors = re.findall(r"`([a-z_.]+)\.(\w+)\(([^`]*?)\)(?: -> [^`]*)?`", table)
    assert len(doors) > 18
    for module, name, arguments in doors:
        signature = inspect.signature(getattr(importlib.import_module(f"megatron_7b.{module}"), name))
        for argument in arguments.split(", "):
            word, _, default = argument.partition("=")
            if word not in ("*", ""):
                assert word in signature.parameters, f"{module}.{name} has no {word}"
                assert not default or signature.parameters[word].default == ast.literal_eval(default)
