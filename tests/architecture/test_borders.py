"""Which library may be imported where. The layers among our own packages are import-linter's (`make check`)."""

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.architecture.imports import PACKAGE, REPOSITORY, imports_of, is_under, package_of, sources


class Border(NamedTuple):
    """A library and the packages (or single files) that may import it."""

    library: str
    allowed: frozenset[str]
    reason: str


BORDERS = [
    Border(
        "transformers",
        frozenset({"conversion", "tokenizer", "evaluation", "serving"}),
        "Hugging Face names stay at the border; nothing that trains depends on them",
    ),
    Border(
        "transformer_engine",
        frozenset({"model", "optim", "runtime"}),
        "an optional kernel library must not be needed by anything else",
    ),
    Border("apex", frozenset({"model", "optim", "runtime"}), "as Transformer Engine"),
    Border(
        "megatron.core.parallel_state",
        frozenset({"parallel"}),
        "one reader of megatron-core's global process groups",
    ),
    Border("megatron.training", frozenset(), "its argument parser and globals are what this project does without"),
    Border("lm_eval", frozenset({"evaluation"}), "one place that knows how the harness sees a model"),
    Border("compressed_tensors", frozenset({"compression"}), "one place that knows formats of quantised weights"),
    Border("gguf", frozenset({"compression"}), "one place that knows formats of quantised weights"),
    Border("fastapi", frozenset({"serving"}), "an optional server"),
    Border("uvicorn", frozenset({"serving"}), "an optional server"),
    Border("prometheus_client", frozenset({"serving"}), "an optional server"),
    Border("llguidance", frozenset({"generation"}), "the engine asks it which tokens may come next"),
    Border("wandb", frozenset({"training"}), "an optional sink of metrics"),
    Border("tensorboard", frozenset({"training"}), "a sink of metrics"),
    Border("matplotlib", frozenset({"training", "evaluation"}), "pictures of a run"),
]

# These must start in a fraction of a second, and run where no torch is installed.
TORCH_FREE = ("config", "tokenizer", "data", "prepare", "planning", "errors")
HEAVY = ("torch", "megatron", "transformers", "transformer_engine", "apex", "tensorboard", "matplotlib")


def violations(path: Path, source: str) -> list[str]:
    """Return what in a file crosses a border, as `path:line: message`."""
    package = package_of(path)
    relative = path.relative_to(PACKAGE).as_posix()
    found = []
    for imported in imports_of(source):
        where = f"megatron_7b/{relative}:{imported.line}: imports {imported.name}"
        for border in BORDERS:
            if is_under(imported.name, border.library) and not border.allowed & {package, relative}:
                allowed = ", ".join(sorted(border.allowed)) or "nowhere"
                found.append(f"{where}, allowed in {allowed}: {border.reason}")
        if package in TORCH_FREE and any(is_under(imported.name, heavy) for heavy in HEAVY):
            if package == "tokenizer" and not imported.at_import and is_under(imported.name, "transformers"):
                continue  # the writer of a Hugging Face folder may ask transformers for it, at that moment only
            found.append(f"{where}, but {package} must work without it")
        if imported.name.startswith("."):
            found.append(f"{where} relatively")
    return found


def test_imports_respect_the_borders() -> None:
    assert [found for path in sources() for found in violations(path, path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    ("package", "source", "crossing"),
    [
        ("data", "import torch", "must work without it"),
        ("data", "def f():\n    from torch.nn import functional", "must work without it"),
        ("training", "from megatron.core import parallel_state", "allowed in parallel"),
        ("training", "import megatron.core.parallel_state as ps", "allowed in parallel"),
        ("training", "from transformers import AutoConfig", "Hugging Face names"),
        ("model", "from megatron.training import get_args", "nowhere"),
        ("checkpoint", "import importlib\nimportlib.import_module('transformer_engine.pytorch')", "optional kernel"),
        ("model", "from .sizes import count_parameters", "relatively"),
    ],
)
def test_a_crossing_is_noticed(package: str, source: str, crossing: str) -> None:
    assert any(crossing in message for message in violations(PACKAGE / package / "new.py", source))


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("parallel", "from megatron.core import parallel_state"),
        ("training", "from megatron.core import tensor_parallel\nimport torch"),
        ("conversion", "from transformers import AutoConfig"),
        ("tokenizer", "def f():\n    from transformers import PreTrainedTokenizerFast"),
    ],
)
def test_what_is_allowed_passes(package: str, source: str) -> None:
    assert violations(PACKAGE / package / "new.py", source) == []


DOORS = (
    "config", "tokenizer", "data", "prepare", "checkpoint", "objective", "training", "evaluation", "conversion",
    "generation", "parallel", "planning", "cli.main",
)  # fmt: skip


def test_importing_the_doors_loads_nothing_heavy() -> None:
    """The syntax trees cannot see what comes in through a third library: ask the interpreter."""
    script = f"""
import importlib, sys
for door in {DOORS!r}:
    module = importlib.import_module(f"megatron_7b.{{door}}")
    missing = [name for name in getattr(module, "__all__", ()) if not hasattr(module, name)]
    print(*(f"{{door}}: {{found}}" for found in [*missing, *({{*{HEAVY!r}}} & set(sys.modules))]))
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_libraries_say_nothing_as_they_load() -> None:
    """Neither to users of a command, nor to those of Python: what these warn of is no user's business."""
    script = "import megatron_7b.evaluation.corpus_loss, megatron_7b.training.loop"
    result = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
