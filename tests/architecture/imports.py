"""Which modules a file imports, read from its syntax tree: nothing is executed."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "megatron_7b"


class Import(NamedTuple):
    """One imported name.

    Attributes:
        name: Dotted; for `from a.b import c` it is `a.b.c`, so that both `a.b` and `a.b.c` can be matched as prefixes.
        line: Where it stands.
        at_import: Whether importing the file executes it: neither inside a function nor under TYPE_CHECKING.
    """

    name: str
    line: int
    at_import: bool


def imports_of(source: str) -> Iterator[Import]:
    """Yield every import statement of a source text, and `importlib.import_module("…")` of a literal."""
    yield from _walk(ast.parse(source), at_import=True)


def _walk(node: ast.AST, *, at_import: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(alias.name, node.lineno, at_import)
    elif isinstance(node, ast.ImportFrom):
        for alias in node.names:
            yield Import(f"{'.' * node.level}{node.module or ''}.{alias.name}", node.lineno, at_import)
    elif isinstance(node, ast.Call) and (name := _literal_import(node)) is not None:
        yield Import(name, node.lineno, at_import)
    if isinstance(node, ast.If) and _is_type_checking(node.test):
        for child in node.body:
            yield from _walk(child, at_import=False)
        for child in node.orelse:
            yield from _walk(child, at_import=at_import)
        return
    inside_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, at_import=at_import and not inside_function)


def _literal_import(call: ast.Call) -> str | None:
    """Return the name that `import_module("name")`, `__import__("name")` or `find_spec("name")` is called with."""
    function = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", None)
    if function not in {"import_module", "__import__"} or not call.args:
        return None
    argument = call.args[0]
    return argument.value if isinstance(argument, ast.Constant) and isinstance(argument.value, str) else None


def _is_type_checking(test: ast.expr) -> bool:
    return "TYPE_CHECKING" in {getattr(test, "id", None), getattr(test, "attr", None)}


def is_under(name: str, prefix: str) -> bool:
    """Tell whether a dotted name is `prefix` or lies inside it."""
    return name == prefix or name.startswith(f"{prefix}.")


def package_of(path: Path) -> str:
    """Return the first-level package (or module) of megatron_7b that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def sources() -> list[Path]:
    """Return every Python file of the package."""
    return sorted(PACKAGE.rglob("*.py"))
