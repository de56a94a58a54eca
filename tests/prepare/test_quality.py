"""The quality rules: the same decisions as datatrove's filters, also where those cannot be used as they are."""

import json
import random
from collections import Counter
from collections.abc import Callable
from functools import cache

import pytest

from megatron_7b.errors import DataFormatError
from megatron_7b.prepare.document import Document, Removed
from megatron_7b.prepare.document_sections import (
    C4Section,
    FineWebSection,
    GopherQualitySection,
    GopherRepetitionSection,
)
from megatron_7b.prepare.rules.gopher import GopherQuality, GopherRepetition, RepeatedNgrams
from megatron_7b.prepare.rules.web_pages import C4, BadWords, FineWeb
from megatron_7b.prepare.rules.words import split_bare_words, split_words
from tests.prepare.web_archives import PROSE
from tests.support.assets import asset

# Two common characters to a word, as in news text.
CHINESE = (
    "委员会在每个月的第一个星期一在旧图书馆开会，秘书宣读上次会议的记录。几位成员要求更多的时间，因为承诺的数字还没有到。"
    "经过长时间的讨论，他们同意推迟投票，写信给市长，并带着一个城市负担得起的计划回来。许多居民来听，有些人也发了言。\n"
    "有一位老人说，他记得桥建成的那一天，河水那时比现在高得多。孩子们在外面等着，天色渐渐暗了下来，灯一盏一盏地亮了。\n"
)


@cache
def texts() -> list[str]:
    """Speeches and plays whole, cut at random, and made repetitive in several ways."""
    whole = [
        json.loads(line)["text"]
        for name in ("sotu", "shakespeare")
        for line in asset(f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:12]
    ]
    random_ = random.Random(0)
    cut: list[str] = []
    for text in whole:
        start = 0
        while start < len(text):
            size = int(10 ** random_.uniform(1, 4.2))
            cut.append(text[start : start + size])
            start += size
    repetitive = []
    for text in cut[:200]:
        words = text.split() or ["word"]
        repetitive.append(" ".join(random_.choices(words[: random_.randint(1, 40)], k=random_.randint(3, 300))))
        repetitive.append("\n".join(" ".join(words[: random_.randint(1, 30)]) for _ in range(random_.randint(1, 8))))
        repetitive.append(text + "\n\n" + text[: len(text) // random_.randint(1, 6)])
    marked = [
        text.replace(" ", mark, len(text) // 40) for text in cut[:60] for mark in (" # ", "... ", "\n- ", "...\n")
    ]
    return whole[:2] + cut[:500] + repetitive + marked


RULES = {
    "gopher_short_doc": "too_few_words",
    "gopher_long_doc": "too_many_words",
    "gopher_below_avg_threshold": "short_words",
    "gopher_above_avg_threshold": "long_words",
    "gopher_too_many_hashes": "hashes",
    "gopher_too_many_ellipsis": "ellipses",
    "gopher_too_many_bullets": "bullet_lines",
    "gopher_too_many_end_ellipsis": "ellipsis_lines",
    "gopher_below_alpha_threshold": "few_alphabetic_words",
    "gopher_enough_stop_words": "few_stop_words",
    "dup_para_frac": "duplicate_paragraphs",
    "dup_para_char_frac": "duplicate_paragraph_characters",
    "dup_line_frac": "duplicate_lines",
    "dup_line_char_frac": "duplicate_line_characters",
    **{f"top_{n}_gram": f"top_{n}_gram" for n in (2, 3, 4)},
    **{f"duplicated_{n}_n_grams": f"duplicate_{n}_grams" for n in range(5, 11)},
    "empty": "empty",
    "line_punct_ratio": "unpunctuated_lines",
    "short_line_ratio": "short_lines",
    "char_dup_ratio": "duplicate_line_characters",
    "list_ratio": "lines_per_word",
}
"""datatrove's names of the reasons, and ours."""


@pytest.fixture
def their_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let datatrove's filters count our words: its own need spaCy, and count punctuation."""
    pytest.importorskip("datatrove")
    from datatrove.pipeline.filters import fineweb_quality_filter, gopher_quality_filter, gopher_repetition_filter

    for module in (gopher_quality_filter, gopher_repetition_filter, fineweb_quality_filter):
        monkeypatch.setattr(module, "split_into_words", lambda text, language: split_words(text))


def decide(step: Callable[[Document], Document | Removed], text: str) -> str | None:
    outcome = step(Document(text, "file", 1))
    return outcome.reason.partition(":")[2] if isinstance(outcome, Removed) else None


def assert_same_decisions(ours: Callable[[Document], Document | Removed], theirs: object, wanted: set[str]) -> None:
    from datatrove.data import Document as TheirDocument

    seen: Counter[str | None] = Counter()
    for text in texts():
        if not text.strip():
            continue
        result = theirs.filter(TheirDocument(text, ""))  # type: ignore[attr-defined]
        reason = None if result is True else RULES[result[1]]
        assert decide(ours, text) == reason, text[:300]
        seen[reason] += 1
    assert wanted <= set(seen), f"not exercised: {wanted - set(seen)}"
    assert seen[None] > 50


@pytest.mark.usefixtures("their_words")
def test_gopher_repetition_decides_as_datatrove() -> None:
    from datatrove.pipeline.filters import GopherRepetitionFilter

    wanted = {f"top_{n}_gram" for n in (2, 3, 4)} | {
        "duplicate_5_grams",
        "duplicate_lines",
        "duplicate_line_characters",
    }
    assert_same_decisions(GopherRepetition(GopherRepetitionSection()), GopherRepetitionFilter(), wanted)


@pytest.mark.usefixtures("their_words")
def test_gopher_quality_decides_as_datatrove() -> None:
    from datatrove.pipeline.filters import GopherQualityFilter

    wanted = {"too_few_words", "short_words", "hashes", "ellipses", "few_alphabetic_words", "few_stop_words"}
    assert_same_decisions(GopherQuality(GopherQualitySection()), GopherQualityFilter(), wanted)


@pytest.mark.usefixtures("their_words")
def test_fineweb_decides_as_datatrove() -> None:
    from datatrove.pipeline.filters import FineWebQualityFilter

    wanted = {"unpunctuated_lines", "short_lines", "duplicate_line_characters", "lines_per_word"}
    section = FineWebSection(min_punctuated_lines=0.1, short_line_length=20, max_lines_per_word=0.12)
    theirs = FineWebQualityFilter(line_punct_thr=0.1, short_line_length=20, new_line_ratio=0.12)
    assert_same_decisions(FineWeb(section), theirs, wanted)


def test_repeated_ngrams_against_counting_them() -> None:
    random_ = random.Random(1)
    for _ in range(200):
        words = random_.choices("abcdefg"[: random_.randint(1, 7)], k=random_.randint(1, 60))
        ngrams = RepeatedNgrams(words, joint=1)
        for n in range(2, 8):
            ngrams.grow(n)
            grams = [" ".join(words[at : at + n]) for at in range(len(words) - n + 1)]
            top = Counter(grams).most_common(1)
            assert ngrams.top_characters() == (len(top[0][0]) * top[0][1] if top else 0)
            seen, repeated, at = set(), 0, 0
            while at < len(grams):
                if grams[at] in seen:
                    repeated += n
                    at += n
                else:
                    seen.add(grams[at])
                    at += 1
            assert ngrams.repeated_characters() == repeated


def test_words_of_one_character_are_not_held_against_a_mixed_text() -> None:
    """Chinese beside English, neither of them most of it: its characters are words, and short ones."""
    english = "The harbour was quiet when the first boats came back, and nobody asked what they had found that day. "
    step = GopherQuality(GopherQualitySection())
    mixed = english * 3 + CHINESE[:55]
    assert isinstance(step(Document(mixed, "file", 1)), Document)
    short = step(Document("It is as I am to be or so he is at it on a go we do by us. " * 4 + CHINESE[:60], "file", 1))
    assert isinstance(short, Removed)
    assert short.reason == "gopher_quality:short_words"


def test_chinese_text_passes_every_filter() -> None:
    """Counted by whitespace, or with English limits, all of it would go."""
    steps = [
        GopherRepetition(GopherRepetitionSection()),
        GopherQuality(GopherQualitySection()),
        FineWeb(FineWebSection()),
    ]
    for text in (CHINESE, "１９９８年3月5日，第9届大会在A市召开，到会的有７６人。" + CHINESE):
        for step in steps:
            document = Document(text, "file", 1, {"language": "zh"})
            assert step(document) is document, step.name
    repeated = Document(CHINESE * 3, "file", 1, {"language": "zh"})
    assert isinstance(steps[0](repeated), Removed)


def test_words_of_scripts_without_spaces() -> None:
    assert split_words("Hello, world! 很好。OK「好」") == ["Hello,", "world!", "很", "好。", "OK「", "好」"]
    assert split_words("plain words only") == ["plain", "words", "only"]
    assert split_bare_words("Don't say “很好”!") == ["Don", "t", "say", "很", "好"]


def test_stop_words_are_asked_of_english_only() -> None:
    german = "Das Komitee traf sich in der alten Bibliothek am ersten Montag des Monats. " * 8
    step = GopherQuality(GopherQualitySection())
    assert decide(step, german) == "few_stop_words"
    document = Document(german, "file", 1, {"language": "de"})
    assert step(document) is document
    own = GopherQuality(GopherQualitySection(stop_words=("der", "die", "des", "am")))
    assert own(document) is document


def test_c4_keeps_sentences_and_drops_pages() -> None:
    page = f"Home\nAbout us\n{PROSE} Late.\nIt uses cookies for all.\nRead it[3] in the paper now.\nmore..."
    document = C4(C4Section())(Document(page, "file", 1))
    assert isinstance(document, Document)
    assert document.text == f"{PROSE} Late.\nRead it in the paper now."
    assert decide(C4(C4Section()), f"{PROSE} {{x}}") == "curly_bracket"
    assert decide(C4(C4Section(drop_curly_brackets=False)), f"{PROSE} So be it: {{x}}. Done.") is None
    assert decide(C4(C4Section()), "Lorem ipsum dolor sit amet.") == "lorem_ipsum"
    assert decide(C4(C4Section()), "One sentence is not enough.") == "too_few_sentences"


def test_bad_words_are_whole_words_and_phrases(tmp_path) -> None:
    listed = tmp_path / "words.txt"
    listed.write_text("Ass\nvery bad thing\n坏话\n", encoding="utf-8")
    step = BadWords(str(listed))
    assert decide(step, "a class, an assembly, very bad") is None
    for text in ("You ASS!", "a very, bad thing", "他说坏话。"):
        assert isinstance(step(Document(text, "file", 1)), Removed)
    listed.write_text("\n \n", encoding="utf-8")
    with pytest.raises(DataFormatError, match="no word"):
        BadWords(str(listed))
