"""Labelled records: every mistake is named by file and line, and what is encoded leads back to the text."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_7b.data.labelled import questions, tags, texts
from megatron_7b.data.labelled.frames import Frame, find_frame, shortened
from megatron_7b.errors import DataFormatError
from megatron_7b.tokenizer import Tokenizer, load_tokenizer
from tests.conversion.tiny_models import save_tiny_tokenizer

FRAME = Frame((1,), (2,), (2,))
PEOPLE = {"tokens": ["Ada", "came"], "tags": ["B-PER", "O"]}
ASKED = {"question": "who?", "context": "The cat sat.", "answers": [{"text": "cat", "answer_start": 4}]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tiny_tokenizer(folder)
    return load_tokenizer(folder)


def read_texts(file: Path, tokenizer: Tokenizer) -> list[Any]:
    classes = texts.find_classes([file], None, ())
    return list(texts.read_texts(file, texts.TextEncoder(tokenizer, FRAME, 64), classes))


def read_learned(file: Path, tokenizer: Tokenizer) -> list[Any]:
    classes = texts.Classes("single_label_classification", ("bad", "good"))
    return list(texts.read_texts(file, texts.TextEncoder(tokenizer, FRAME, 64), classes))


def read_tags(file: Path, tokenizer: Tokenizer) -> list[Any]:
    found = tags.find_tags([file], "bio")
    return list(tags.read_tagged(file, tags.TagEncoder(tokenizer, FRAME, 64), found, "bio"))


def read_windows(file: Path, tokenizer: Tokenizer) -> list[Any]:
    return list(questions.read_windows(file, questions.QuestionEncoder(tokenizer, FRAME, 64, 8)))


@pytest.mark.parametrize(
    ("read", "good", "bad", "words"),
    [
        (read_texts, {"text": "a cat", "label": "good"}, {"text": "a cat"}, "it has no 'label'"),
        (read_texts, {"text": "a cat", "label": "good"}, {"text": " ", "label": "good"}, "'text' is empty"),
        (read_texts, {"text": "a cat", "label": "good"}, {"text": "a", "label": 1}, "a JSON int; those before it are"),
        (read_texts, {"text": "a cat", "label": ["good"]}, {"text": "a", "label": "good"}, "those before it are"),
        (read_texts, {"text": "a cat", "label": "good"}, {"text": "a", "label": {}}, "'label' has a JSON dict"),
        (read_texts, {"text": "a", "label": "x"}, {"text": "a", "text_pair": "b", "label": "x"}, "a text_pair and 1"),
        (read_texts, {"text": "a", "label": 0.5}, {"text": "a", "label": [0.5, 1.0]}, "those before it are"),
        (read_texts, {"text": "a", "label": ["x"]}, {"text": "a", "label": ["x", "x"]}, "which has a label twice"),
        (read_learned, {"text": "a cat", "label": "good"}, {"text": "a", "label": "new"}, "none of those learned: bad"),
        (read_tags, PEOPLE, {"tokens": ["Ada"], "tags": ["B-PER", "O"]}, "2 tags for 1 tokens"),
        (read_tags, PEOPLE, {"tokens": ["Ada"], "tags": ["PER"]}, "'PER' at 0, expected O, B-NAME or I-NAME"),
        (read_tags, PEOPLE, {"tokens": ["an", "Ada"], "tags": ["O", "I-PER"]}, "a name begins with 'B-PER'"),
        (read_tags, PEOPLE, {"tokens": ["Ada", ""], "tags": ["O", "O"]}, "'tokens' has '' at 1"),
        (read_windows, ASKED, {**ASKED, "answers": [{"text": "cat", "answer_start": 3}]}, "is not at 3, where"),
        (read_windows, ASKED, {**ASKED, "answers": [{"text": "cat", "answer_start": 40}]}, "outside of the context"),
        (read_windows, ASKED, {**ASKED, "answers": "cat"}, "expected a list"),
        (read_windows, ASKED, {**ASKED, "question": ""}, "'question' is empty"),
        (read_windows, ASKED, {**ASKED, "question": "the cat " * 40}, "which leaves 0 of the 64 of a window"),
    ],
)
def test_mistakes_are_named_by_file_and_line(
    read: Callable[[Path, Tokenizer], list[Any]],
    good: dict[str, Any],
    bad: dict[str, Any],
    words: str,
    tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    file = tmp_path / "f.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, [good, good])).encode())
    assert read(file, tokenizer)
    file.write_text("\n".join(map(json.dumps, [good, bad])))
    with pytest.raises(DataFormatError) as raised:
        read(file, tokenizer)
    assert f"{file}:2: " in str(raised.value)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("labels", "problem", "names"),
    [
        (["b", "a", "b"], "single_label_classification", ("a", "b")),
        ([10, 9], "single_label_classification", ("9", "10")),
        ([["b"], [], ["a", "b"]], "multi_label_classification", ("a", "b")),
        ([1, 0.5], "regression", ()),
    ],
)
def test_labels_say_what_they_are(labels: list[Any], problem: str, names: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "f.jsonl"
    file.write_text("\n".join(json.dumps({"text": "a", "label": label}) for label in labels))
    classes = texts.find_classes([file], None, ())
    assert (classes.problem_type, classes.names) == (problem, names)


def test_long_pairs_lose_the_end_of_the_longer_text() -> None:
    assert [len(part) for part in shortened(range(9), range(3), 6)] == [3, 3]
    assert [len(part) for part in shortened(range(9), range(3), 10)] == [7, 3]
    assert [len(part) for part in shortened(range(5), range(5), 5)] == [2, 3]
    for first, second, room in [(1, 9, 4), (8, 8, 3), (2, 2, 9), (30, 1, 2)]:
        parts = shortened(range(first), range(second), room)
        assert sum(map(len, parts)) == min(room, first + second)


def test_tags_are_on_the_first_token_of_each_word(tokenizer: Tokenizer) -> None:
    """Also where a text takes several pieces, and where a token begins with the space before its word."""
    words = ["the", "cat's", "naïve", "12", "o'clock", "nap"] * 4
    given = ["O", "B-X", "I-X", "O", "B-Y", "O"] * 4
    encoder = tags.TagEncoder(tokenizer, FRAME, 24)
    records = encoder.encode({"tokens": words, "tags": given}, ("O", "B-X", "I-X", "B-Y"), "bio")
    assert len(records) > 1
    assert all(len(record.sequences[0]) <= 24 for record in records)
    found = [
        (token, int(value) - 1)
        for record in records
        for token, value in zip(record.sequences[0].tolist(), record.token_values, strict=True)
        if value
    ]
    assert [number for _, number in found] == [("O", "B-X", "I-X", "B-Y").index(tag) for tag in given]
    for (token, _), word in zip(found, words, strict=True):
        assert word.startswith(tokenizer.decode([token]).strip("� "))


def test_windows_hold_the_answer_or_say_that_they_do_not(tokenizer: Tokenizer) -> None:
    context = "the cat sat on the mat 12 times, naïve " * 6 + "and the 123 naps came. " + "o'clock " * 20
    start = context.index("123 naps")
    record = {"question": "what?", "context": context, "answers": {"text": ["123 naps"], "answer_start": [start]}}
    encoder = questions.QuestionEncoder(tokenizer, FRAME, 40, 10)
    windows, records = encoder.windows("what?", context), encoder.encode(record)
    assert len(windows) > 3
    assert {place for window in windows for span in window.spans.tolist() for place in range(*span)} >= {
        place for place, character in enumerate(context.rstrip()) if not character.isspace()
    }
    found = []
    for window, encoded in zip(windows, records, strict=True):
        assert len(window.ids) <= 40
        first, last = map(int, encoded.values)
        if (first, last) != (0, 0):
            spans = window.spans[first - window.begin : last - window.begin + 1]
            found.append(context[spans[0, 0] : spans[-1, 1]].strip())
    assert set(found) == {"123 naps"}


def test_squad_is_read_as_lines_are(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_text(json.dumps(ASKED))
    asked = {"question": ASKED["question"], "id": "1", "answers": ASKED["answers"]}
    squad = {"data": [{"title": "t", "paragraphs": [{"context": ASKED["context"], "qas": [asked]}]}]}
    (tmp_path / "squad.json").write_text(json.dumps(squad, indent=1))
    lines, nested = (read_windows(tmp_path / name, tokenizer) for name in ("lines.jsonl", "squad.json"))
    for one, other in zip(lines, nested, strict=True):
        np.testing.assert_array_equal(one.sequences[0], other.sequences[0])
        np.testing.assert_array_equal(one.values, other.values)
    asked["answers"] = [{"text": "dog", "answer_start": 4}]
    (tmp_path / "squad.json").write_text(json.dumps(squad))
    with pytest.raises(DataFormatError, match=r"data\[0\].paragraphs\[0\].qas\[0\]: the answer 'dog' is not at 4"):
        read_windows(tmp_path / "squad.json", tokenizer)


def test_frames_are_those_of_transformers(tokenizer: Tokenizer) -> None:
    frame = find_frame(tokenizer, is_encoder=False)
    assert frame.before == frame.after == ()
    assert frame.between == tuple(tokenizer.encode("\n"))


def test_mistakes_in_texts_and_labels_are_told_together(tmp_path: Path) -> None:
    file = tmp_path / "it.jsonl"
    lines = [{"text": "x", "label": "a"}, {"text": " ", "label": "a"}, {"label": "a"}, {"text": "y", "label": 3}]
    file.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(DataFormatError) as error:
        texts.find_classes([file], None, ())
    assert all(f"{file}:{number}" in str(error.value) for number in (2, 3, 4))
    file.write_text(json.dumps({"context": "the cat", "answers": []}) + '\n{"question": "?", "context": ""}')
    with pytest.raises(DataFormatError) as error:
        questions.has_unanswered([file])
    assert all(f"{file}:{number}" in str(error.value) for number in (1, 2))
