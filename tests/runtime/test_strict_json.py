"""Strict JSON: what could be read in two ways is refused, and fields have the types that they are declared with."""

import json
from dataclasses import dataclass, field

import pytest

from megatron_7b.runtime.strict_json import CHECKSUM, MismatchError, build, checksum, parse_object


@dataclass
class Part:
    size: int
    name: str = ""


@dataclass
class Whole:
    count: int
    ratio: float | None = None
    order: dict[str, int] | None = None
    parts: dict[str, Part] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "gives 'a' twice"),
        ('{"a": {"b": 1, "b": 1}}', "gives 'b' twice"),
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "-Infinity"),
        ("[1]", "expected an object"),
        ('{"a": 1', "delimiter"),
        ('{"a": 1} {}', "Extra data"),
        ("", "Expecting value"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "digits"),
    ],
)
def test_what_could_be_misread_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(MismatchError, match=complaint):
        parse_object(text)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({}, "manifest has no count"),
        ({"count": True}, "count is True, expected int"),
        ({"count": 1.0}, r"count is 1\.0, expected int"),
        ({"count": 1, "ratio": 1}, "ratio is 1, expected float or null"),
        ({"count": 1, "parts": []}, "parts is"),
        ({"count": 1, "parts": {"a": {}}}, "parts\\['a'\\] has no size"),
        ({"count": 1, "parts": {"a": 3}}, "parts\\['a'\\] is 3, expected an object"),
        ([], "manifest is"),
    ],
)
def test_fields_have_their_types(content: object, complaint: str) -> None:
    with pytest.raises(MismatchError, match=complaint):
        build(Whole, content, "manifest")


def test_dataclasses_come_back_and_exactness_is_a_choice() -> None:
    content = {"count": 1, "parts": {"a": {"size": 3}}}
    whole = Whole(count=1, parts={"a": Part(size=3)})
    assert build(Whole, content, "it") == whole
    assert build(Whole, content | {"new": 1}, "it") == whole
    assert build(Whole, {"count": 1, "parts": {"a": {"size": 3, "name": ""}}}, "it", exact=True) == whole
    assert build(Whole, content | {"order": {"a": 1}}, "it").order == {"a": 1}
    with pytest.raises(MismatchError, match="it has no parts"):
        build(Whole, {"count": 1}, "it", exact=True)
    with pytest.raises(MismatchError, match="unknown fields: 'new'"):
        build(Part, {"size": 1, "name": "", "new": 1}, "it", exact=True)


def test_a_checksum_sees_content_and_nothing_else() -> None:
    content = {"b": [1, 2], "a": "ä"}
    expected = checksum(content)
    assert checksum(json.loads(json.dumps(content, indent=3, sort_keys=True, ensure_ascii=False))) == expected
    assert checksum(content | {CHECKSUM: "anything"}) == expected
    assert checksum(content | {"b": [2, 1]}) != expected
