"""What is wrong with a configuration, gathered so that a user reads all of it at once."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_7b.errors import ConfigError

NOT_GIVEN = object()
"""Stands for the value of an option that was named without one."""


@dataclass(frozen=True)
class Problem:
    """One mistake in a configuration."""

    path: str
    """Dotted path of the option, or the name of a file or flag."""
    value: object
    """What was given, as the user wrote it."""
    message: str
    """What is wrong and what is allowed instead."""
    origin: str | None = None
    """Where the value was written (a file, a preset, the command line); None where it is a default."""
    meant: str | None = None
    """The option that an unknown path most likely means."""

    def __str__(self) -> str:
        origin = f"  ({self.origin})" if self.origin else ""
        value = "" if self.value is NOT_GIVEN else f" = {shown(self.value)}"
        return f"{self.path}{value}{origin}\n    {self.message}"


def shown(value: object) -> str:
    """Return a value as it would be written on the command line or in YAML."""
    if value is None:
        return "none"
    if isinstance(value, str):
        return value or '""'
    if isinstance(value, list | tuple):
        return " ".join(shown(item) for item in value) or "(empty)"
    return str(value)


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the one of `names` that `name` is most likely a misspelling of, or None if nothing is close."""
    candidates = list(names)
    for cutoff in (0.8, 0.6):
        if matches := difflib.get_close_matches(name, candidates, n=1, cutoff=cutoff):
            return matches[0]
    return None


def nearest_path(path: str, paths: Sequence[str]) -> str | None:
    """Return the option that `path` most likely means: the same name in another section counts before a similar one."""
    _, _, name = path.rpartition(".")
    same_name = [known for known in paths if known.rpartition(".")[2] == name]
    return same_name[0] if len(same_name) == 1 else nearest(path, paths)


def raise_problems(problems: Sequence[Problem]) -> None:
    """Raise one ConfigError that lists `problems`; return when there are none."""
    if not problems:
        return
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    body = "\n".join(f"  {line}" for problem in problems for line in str(problem).splitlines())
    raise ConfigError(f"{count} in the configuration:\n{body}")
