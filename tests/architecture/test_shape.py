"""The shape of the tree: short files, short functions, no drawer without a label, a docstring for every module."""

import ast
from pathlib import Path

from tests.architecture.imports import PACKAGE, sources

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
UNLABELLED = {"utils", "util", "helpers", "helper", "common", "misc"}


def too_long(path: Path) -> list[str]:
    """Return what in a file exceeds the limits, as `path: what: lines`."""
    source = path.read_text(encoding="utf-8")
    lengths = {"file": (len(source.splitlines()), MAX_FILE_LINES)} | {
        node.name: (node.end_lineno - node.lineno + 1, MAX_FUNCTION_LINES)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
    }
    name = path.relative_to(PACKAGE).as_posix()
    return [f"{name}: {what}: {lines} lines" for what, (lines, limit) in lengths.items() if lines > limit]


def test_files_and_functions_stay_short() -> None:
    assert [found for path in sources() for found in too_long(path)] == []


def test_no_module_is_a_drawer_without_a_label() -> None:
    assert [path for path in sources() if path.stem in UNLABELLED] == []


def test_every_module_says_what_it_is() -> None:
    silent = [
        path.relative_to(PACKAGE).as_posix()
        for path in sources()
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert silent == []
