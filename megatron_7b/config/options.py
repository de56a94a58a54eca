"""The schema seen as a flat table of options: dotted path, type, default and docstring.

Both the reader of YAML and the command line work from this table, so a field that is added to the schema is an option
everywhere at once.
"""

import ast
import dataclasses
import sys
import types
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from megatron_7b.config import schema
from megatron_7b.config.one_of import OneOf
from megatron_7b.config.problems import shown


@dataclasses.dataclass(frozen=True)
class Option:
    """One leaf of the configuration tree."""

    path: str
    """Dotted path, `section.field`."""
    annotation: object
    """The field's type without `| None`."""
    optional: bool
    """Whether `none` is a value."""
    default: object
    doc: str
    """The docstring under the field, on one line."""

    @property
    def flag(self) -> str:
        """The spelling on the command line, `--section.field-name`."""
        return "--" + self.path.replace("_", "-")

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a Literal or the names of a table; empty for other types."""
        if typing.get_origin(self.annotation) is typing.Annotated:
            _, names = typing.get_args(self.annotation)
            return tuple(typing.cast(OneOf, names).table)
        return typing.get_args(self.annotation) if typing.get_origin(self.annotation) is typing.Literal else ()

    @property
    def takes_many(self) -> bool:
        """Whether the option takes several values."""
        return typing.get_origin(self.annotation) is tuple

    @property
    def allowed(self) -> str:
        """What may be written, in words."""
        words = " | ".join(self.choices) if self.choices else _WORDS.get(self.annotation, "")
        if self.takes_many:
            items = typing.get_args(self.annotation)
            noun = {str: "texts", int: "integers", float: "numbers"}[items[0]]
            words = noun if items[-1] is Ellipsis else f"{len(items)} {noun}"
        if dataclasses.is_dataclass(self.annotation):
            words = "a mapping"
        return f"{words} or none" if self.optional else words

    @property
    def metavar(self) -> str:
        """The placeholder in help texts."""
        if dataclasses.is_dataclass(self.annotation):
            metavar = "{}"
        elif self.choices:
            metavar = "|".join(self.choices)
        elif self.takes_many:
            items = typing.get_args(self.annotation)
            metavar = (
                f"{_METAVARS[items[0]]} …" if items[-1] is Ellipsis else " ".join(_METAVARS[item] for item in items)
            )
        else:
            metavar = _METAVARS[typing.cast(type, self.annotation)]
        return f"{metavar}|none" if self.optional else metavar


_WORDS: dict[object, str] = {bool: "True or False", int: "an integer", float: "a number", str: "a text"}
_METAVARS = {bool: "True|False", int: "INT", float: "FLOAT", str: "TEXT"}


@cache
def options(root: type = schema.RunConfig) -> dict[str, Option]:
    """Return every option by dotted path, in the order of the schema; nested groups follow their parent.

    Args:
        root: A dataclass of sections: that of a run, or another that is read in the same way.
    """
    return {option.path: option for option in _walk(root, "")}


@cache
def sections(root: type = schema.RunConfig) -> dict[str, str]:
    """Return the sections of a schema with the one-line description of each."""
    hints = typing.get_type_hints(root)
    return {field.name: _summary(hints[field.name]) for field in dataclasses.fields(root)}


def leaf_options(root: type = schema.RunConfig) -> list[Option]:
    """Return the options that take a value on the command line: all but the nested groups themselves."""
    return [option for option in options(root).values() if not dataclasses.is_dataclass(option.annotation)]


def get_value(config: object, path: str) -> object:
    """Return the value at a dotted path; None if a nested group on the way is absent."""
    for name in path.split("."):
        config = getattr(config, name, None)
    return config


def command_words(path: str, value: object) -> list[str]:
    """Return the words of a command line that set an option: its flag and values, "" for an empty list."""
    values = [shown(one) for one in value] or [""] if isinstance(value, list | tuple) else [shown(value)]
    return [options()[path].flag, *values]


def _walk(group: type, prefix: str) -> Iterator[Option]:
    hints = typing.get_type_hints(group, include_extras=True)
    docs = _field_docs(group.__module__)[group.__name__]
    for field in dataclasses.fields(group):
        annotation, optional = _without_none(hints[field.name])
        path = f"{prefix}{field.name}"
        nested = isinstance(annotation, type) and dataclasses.is_dataclass(annotation)
        if prefix or not nested:
            doc = docs.get(field.name) or (_summary(typing.cast(type, annotation)) if nested else "")
            yield Option(path, annotation, optional, field.default, doc)
        if nested:
            yield from _walk(typing.cast(type, annotation), f"{path}.")


def _without_none(annotation: object) -> tuple[object, bool]:
    """Split `T | None` into (T, True); any other T gives (T, False)."""
    if typing.get_origin(annotation) not in (types.UnionType, typing.Union):
        return annotation, False
    rest = [item for item in typing.get_args(annotation) if item is not type(None)]
    assert len(rest) == 1, f"options are a single type or None, not {annotation}"
    return rest[0], True


def _summary(group: type) -> str:
    return (group.__doc__ or "").strip().splitlines()[0]


@cache
def _field_docs(module: str) -> dict[str, dict[str, str]]:
    """Docstrings under the fields of each schema class of a module: Python keeps them in the source only."""
    docs: dict[str, dict[str, str]] = {}
    source = Path(str(sys.modules[module].__file__))
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef):
            continue
        found = docs.setdefault(node.name, {})
        for statement, following in zip(node.body, node.body[1:], strict=False):
            if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
                continue
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                found[statement.target.id] = " ".join(str(following.value.value).split())
    return docs
