"""JSON files that must not be misread: one object without doubt, fields of the declared types, a hash of itself.

What a file says can be trusted only if no flipped bit can change it without a word. So a key given twice is an error
instead of the last one winning, NaN is an error, every field has its type, and a file may carry a checksum of its own
content, blind to the order of keys and to white space.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Any, cast, get_args, get_origin, get_type_hints

import xxhash

CHECKSUM = "checksum"

_type_hints = functools.cache(get_type_hints)
"""A blend may have thousands of manifests, and looking the types up takes longer than reading one."""


class MismatchError(ValueError):
    """A text is not the JSON that was expected; the message says where."""


def parse_object(text: str) -> dict[str, Any]:
    """Read a text that is one JSON object.

    Raises:
        MismatchError: It is not JSON, gives a key twice, or holds what JSON has no word for, such as NaN.
    """
    try:
        content = json.loads(text, object_pairs_hook=_unique_pairs, parse_constant=_refuse_constant)
    except RecursionError:
        raise MismatchError("its brackets are nested too deeply") from None
    except ValueError as error:
        raise MismatchError(str(error)) from error
    if not isinstance(content, dict):
        raise MismatchError(f"it is {content!r:.60}, expected an object")
    return content


def checksum(content: Mapping[str, Any]) -> str:
    """xxh3_128 of an object without its own checksum, blind to the order of keys and to white space."""
    rest = {name: value for name, value in content.items() if name != CHECKSUM}
    return xxhash.xxh3_128_hexdigest(json.dumps(rest, sort_keys=True).encode())


def build[T](expected: type[T], content: object, where: str, *, exact: bool = False) -> T:
    """Make a dataclass of an object, every field of its declared type.

    Args:
        expected: A dataclass whose fields are dataclasses, numbers, texts, `dict`s, `Sequence`s or unions of these.
        content: The object.
        where: What to call it in messages.
        exact: Refuse fields that the dataclass does not know, and the lack of those that have a default other than
            None.

    Raises:
        MismatchError: A field is missing, or is not what its type says.
    """
    return cast(T, _Builder(exact=exact).build(expected, content, where))


@dataclasses.dataclass(frozen=True)
class _Builder:
    exact: bool

    def build(self, expected: Any, value: object, where: str) -> object:
        """`value` as the type says: dataclasses from objects, all else as it is once its kind has been checked."""
        if dataclasses.is_dataclass(expected) and isinstance(expected, type):
            return self._build_fields(expected, value, where)
        origin = get_origin(expected) or expected
        members = get_args(expected) if origin is UnionType else (expected,)
        for kind in members:
            if dataclasses.is_dataclass(kind) and isinstance(kind, type) and isinstance(value, dict):
                return self._build_fields(kind, value, where)
        kinds = [list if get_origin(kind) is Sequence else get_origin(kind) or kind for kind in members]
        # True is no number here, although Python's bool is an int.
        if type(value) not in kinds:
            names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise MismatchError(f"{where} is {value!r:.60}, expected {names}")
        if isinstance(value, dict) and get_origin(expected) is dict:
            _, item = get_args(expected)
            if dataclasses.is_dataclass(item):
                return {name: self.build(item, part, f"{where}[{name!r}]") for name, part in value.items()}
        return value

    def _build_fields(self, expected: type, value: object, where: str) -> object:
        if not isinstance(value, dict):
            raise MismatchError(f"{where} is {value!r:.60}, expected an object")
        hints = _type_hints(expected)
        arguments = {}
        for field in dataclasses.fields(expected):
            if field.name in value:
                arguments[field.name] = self.build(hints[field.name], value[field.name], field.name)
            elif field.default is field.default_factory is dataclasses.MISSING or (
                self.exact and field.default is not None
            ):
                raise MismatchError(f"{where} has no {field.name}")
        unknown = value.keys() - arguments.keys()
        if self.exact and unknown:
            raise MismatchError(f"{where} has unknown fields: {', '.join(sorted(map(repr, unknown)))}")
        return expected(**arguments)


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        twice = sorted({name for name, _ in pairs if sum(other == name for other, _ in pairs) > 1})
        raise MismatchError(f"it gives {', '.join(map(repr, twice))} twice")
    return content


def _refuse_constant(name: str) -> object:
    raise MismatchError(f"it holds {name}, which is no JSON")
