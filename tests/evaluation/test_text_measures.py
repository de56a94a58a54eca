"""Measures of written texts: those of the libraries, on planted predictions, in several scripts."""

import pytest

from megatron_7b.errors import ConfigError
from megatron_7b.evaluation.text_measures import MEASURES, MeasureOptions, measure_texts, rouge_words

ENGLISH = (
    ["the cat sat on a mat.", "Hello, big world", "12 o'clock_now", ""],
    ["The cat sat on the mat.", "Hello world!", "12 o'clock now", "nothing"],
)
CHINESE = (
    ["今天天气很好。", "我们去公园散步", "他说GPT-2很大"],
    ["今天的天气非常好。", "我们到公园去散步", "他说GPT-2非常大"],
)
RUSSIAN = (["кошка сидит на коврике"], ["кошка сидела на коврике"])
JAPANESE = (["今日はいい天気です"], ["今日はとてもいい天気です"])


def measured(texts: tuple[list[str], list[str]], **options: object) -> tuple[dict[str, tuple[float, str]], list[str]]:
    warnings: list[str] = []
    found = measure_texts(*texts, MeasureOptions(**{"names": tuple(MEASURES), **options}), warn=warnings.append)  # type: ignore[arg-type]
    return {one.name: (one.value, one.signature) for one in found}, warnings


def test_english_has_the_figures_of_the_libraries_as_they_are():
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    found, warnings = measured(ENGLISH)
    texts, references = ENGLISH
    assert not warnings
    assert found["bleu"][0] == sacrebleu.corpus_bleu(texts, [references]).score
    assert "tok:13a" in found["bleu"][1]
    assert "version:" in found["bleu"][1]
    assert found["chrf"][0] == sacrebleu.corpus_chrf(texts, [references]).score
    assert found["ter"][0] == sacrebleu.corpus_ter(texts, [references]).score
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for name in ("rouge1", "rouge2", "rougeL"):
        scores = [scorer.score(reference, text)[name].fmeasure for text, reference in zip(*ENGLISH, strict=True)]
        assert found[name][0] == pytest.approx(100 * sum(scores) / 4)
    assert found["exact_match"][0] == 0
    assert [one.value for one in measure_texts([" a\n"], ["a"], MeasureOptions(names=("exact_match",)))] == [100]


def test_chinese_is_counted_in_characters():
    import sacrebleu

    found, warnings = measured(CHINESE)
    assert not warnings
    assert found["bleu"][0] == sacrebleu.corpus_bleu(CHINESE[0], [CHINESE[1]], tokenize="zh").score
    assert found["rouge1"][0] == pytest.approx(100 * expected_rouge1(CHINESE))
    assert found["rouge1"][0] > 80
    assert "tok:unicode" in found["rouge1"][1]


def expected_rouge1(texts: tuple[list[str], list[str]]) -> float:
    """Return the mean F1 of single words, counted here."""
    values = []
    for text, reference in zip(*texts, strict=True):
        one, other = rouge_words(text), rouge_words(reference)
        common = sum(min(one.count(word), other.count(word)) for word in set(one))
        values.append(2 * common / (len(one) + len(other)))
    return sum(values) / len(values)


def test_a_tokenizer_that_does_not_fit_is_warned_of():
    found, warnings = measured(CHINESE, bleu_tokenizer="13a", rouge_tokenizer="latin")
    assert any("takes what is between two spaces for a word" in one for one in warnings)
    assert any("drops" in one and "use unicode" in one for one in warnings)
    assert found["rouge1"][0] < 50
    assert any("is for Chinese" in one for one in measured(ENGLISH, bleu_tokenizer="zh")[1])


def test_scripts_choose_the_tokenizers():
    assert measured(RUSSIAN)[0]["rouge1"][0] == pytest.approx(75)
    assert "tok:13a" in measured(RUSSIAN)[0]["bleu"][1]
    assert "tok:char" in measured(JAPANESE)[0]["bleu"][1]
    assert rouge_words("GPT-2 很大, ไทย naïve") == ["gpt", "2", "很", "大", "ไ", "ท", "ย", "naïve"]
    lines = (["one\ntwo"], ["two\none"])
    found, _ = measured(lines)
    assert found["rougeLsum"][0] == 100 > found["rougeL"][0]


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ConfigError, match="2 texts cannot be compared with 1"):
        measure_texts(["a", "b"], ["a"])
    with pytest.raises(ConfigError, match="no measure 'blue'"):
        MeasureOptions(names=("blue",))
