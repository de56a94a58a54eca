"""From settings as they were written (YAML scalars, texts of the command line) to typed, frozen sections.

Written out rather than left to a validation library: the schema is flat, the command line starts a quarter of a second
sooner, and each refusal can say exactly what is allowed (a bool is not an integer here).
"""

import dataclasses
import math
import typing
from collections.abc import Mapping

from megatron_7b.config.options import Option, options, sections
from megatron_7b.config.problems import Problem, nearest, nearest_path
from megatron_7b.config.sources import Setting


def read_settings[T](settings: Mapping[str, Setting], root: type[T]) -> tuple[T, list[Problem]]:
    """Build the configuration that `settings` describe, on top of the defaults.

    Args:
        settings: What was written, by dotted path.
        root: The dataclass of sections to build, such as RunConfig.

    Returns:
        The configuration, in which faulty options keep their defaults, and one problem per faulty option.
    """
    schema: type = root
    known = options(schema)
    problems: list[Problem] = []
    values: dict[str, object] = {}
    for path, setting in settings.items():
        option = known.get(path)
        if option is None:
            problems.append(_unknown(path, setting, schema))
            continue
        try:
            values[path] = _read_value(setting.value, option)
        except ValueError:
            problems.append(Problem(path, setting.value, _expected(setting.value, option), setting.origin))
    return typing.cast(T, _build(root, "", values)), problems


def _build(group: type, prefix: str, values: Mapping[str, object]) -> object:
    """Instantiate a dataclass from the values below `prefix`, nested groups first."""
    hints = typing.get_type_hints(group)
    given: dict[str, object] = {}
    for field in dataclasses.fields(group):
        path = f"{prefix}{field.name}"
        if path in values:
            given[field.name] = values[path]
        elif any(name.startswith(f"{path}.") for name in values):
            given[field.name] = _build(_group_class(hints[field.name]), f"{path}.", values)
    return group(**given)


def _group_class(annotation: object) -> type:
    candidates = typing.get_args(annotation) or (annotation,)
    return next(typing.cast(type, item) for item in candidates if dataclasses.is_dataclass(item))


def _read_value(value: object, option: Option) -> object:
    """Convert one written value; raises ValueError if the option does not allow it."""
    if option.optional and _is_none(value):
        return None
    if option.choices:
        return _read_choice(value, option)
    if dataclasses.is_dataclass(option.annotation):
        if value in ({}, "{}"):  # as in YAML: the group with its defaults
            return typing.cast(type, option.annotation)()
        raise ValueError(value)
    if option.takes_many:
        return _read_tuple(value, typing.get_args(option.annotation))
    return _read_scalar(value, option.annotation)


def _is_none(value: object) -> bool:
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    return value is None or (isinstance(value, str) and value.lower() in ("none", "null"))


def _read_choice(value: object, option: Option) -> str:
    text = "none" if value is None else value
    if isinstance(text, str) and text in option.choices:
        return text
    raise ValueError(value)


def _read_tuple(value: object, items: tuple[object, ...]) -> tuple[object, ...]:
    """Read `tuple[T, ...]` or a fixed number of items; one bare value counts as a list of one."""
    parts = list(value) if isinstance(value, list | tuple) else [value]
    if items[-1] is Ellipsis:
        return tuple(_read_scalar(part, items[0]) for part in parts if part != "")
    if len(parts) != len(items):
        raise ValueError(value)
    return tuple(_read_scalar(part, item) for part, item in zip(parts, items, strict=True))


def _read_scalar(value: object, kind: object) -> object:
    if kind is bool:
        return _read_bool(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(value)
    if kind is str:
        return str(value)
    if kind is int:
        return _read_int(value)
    assert kind is float, f"no reader for options of type {kind}"
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(value)
    return number


def _read_bool(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise ValueError(value)


def _read_int(value: str | int | float) -> int:
    """Read 1000, "1000", "1_000" and "1e3", but not 0.5."""
    try:
        if isinstance(value, int | str):
            return int(value)
    except ValueError:
        pass
    number = float(value)
    if not number.is_integer():  # Also true of infinities and NaN.
        raise ValueError(value)
    return int(number)


def _unknown(path: str, setting: Setting, root: type) -> Problem:
    names = list(options(root))
    guess = nearest_path(path, names)
    section = path.partition(".")[0]
    if path in sections(root):
        message = f"{path} is a section: give its options, as in {next(n for n in names if n.startswith(path + '.'))}"
    elif guess:
        message = f"unknown option; did you mean {guess}?"
    elif section in sections(root):
        known = (name.removeprefix(f"{section}.") for name in names if name.startswith(f"{section}."))
        message = f"unknown option; {section} has {', '.join(known)}"
    else:
        message = f"unknown option; sections are {', '.join(sections(root))}"
    return Problem(path, setting.value, message, setting.origin, meant=guess)


def _expected(value: object, option: Option) -> str:
    guess = nearest(str(value).lower(), option.choices) if option.choices else None
    return f"allowed: {option.allowed}" + (f"; did you mean {guess}?" if guess else "")
