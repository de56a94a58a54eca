"""Typed values out of config.json, with complaints collected instead of stopping at the first."""

from collections.abc import Callable, Mapping
from typing import cast


class ValueReader:
    """Reads typed values of one object.

    Args:
        values: The object.
        problems: Takes the complaints; None begins a list of its own.
        prefix: Where the object is in config.json.
    """

    def __init__(self, values: Mapping[str, object], problems: list[str] | None = None, prefix: str = "") -> None:
        self._values = values
        self._prefix = prefix
        self.problems: list[str] = [] if problems is None else problems

    def integer(self, key: str) -> int:
        """Read a positive integer."""
        value = self._values.get(key)
        return cast(int, self._checked(key, value, is_positive_integer, "a positive integer", 1))

    def optional_integer(self, key: str) -> int | None:
        """Read a positive integer or null."""
        return None if self._values.get(key) is None else self.integer(key)

    def number(self, key: str, *, positive: bool = False, default: float | None = None) -> float:
        """Read a number that is at least 0, or above it; null means the default, if there is one."""
        value = self._values.get(key)
        if value is None and default is not None:
            return default
        minimum = "greater than 0" if positive else "at least 0"
        value = self._checked(key, value, lambda v: _is_number(v, positive=positive), f"a number {minimum}", 1.0)
        return float(cast(float, value))

    def flag(self, key: str) -> bool:
        """Read true or false."""
        value = self._values.get(key)
        return bool(self._checked(key, value, lambda v: isinstance(v, bool), "true or false", False))

    def _checked(
        self, key: str, value: object, is_valid: Callable[[object], bool], expected: str, stand_in: object
    ) -> object:
        if is_valid(value):
            return value
        self.problems.append(f"{self._prefix}{key} is {value!r}, expected {expected}")
        return stand_in


def is_positive_integer(value: object) -> bool:
    """Return whether a value is a positive integer; true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: object, *, positive: bool) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return value > 0 if positive else value >= 0
