"""The shape of the tree: short files, short functions, no drawer without a label, a docstring for every module."""

import ast
from pathlib import Path

import pytest

from tests.architecture.imports import PACKAGE, sources

MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 80
UNLABELLED = {"utils", "util", "helpers", "helper", "common", "misc"}


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_files_and_functions_stay_short(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MAX_FILE_LINES
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    }
    assert long == {}


def test_no_module_is_a_drawer_without_a_label() -> None:
    assert [path for path in sources() if path.stem in UNLABELLED] == []


def test_every_module_says_what_it_is() -> None:
    silent = [
        path.relative_to(PACKAGE).as_posix()
        for path in sources()
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert silent == []
