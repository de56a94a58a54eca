"""How close written texts come to what was expected: BLEU, chrF, TER, ROUGE and exact match, by the field's libraries.

All figures are percentages. BLEU, chrF and TER are sacrebleu's, of the whole corpus, with the signature that makes them
comparable; ROUGE is rouge-score's F1, averaged over the texts.
"""

import logging
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_7b.errors import ConfigError

logger = logging.getLogger(__name__)

type BleuTokenizer = Literal["auto", "13a", "zh", "char", "intl", "ja-mecab", "ko-mecab", "none"]
type RougeTokenizer = Literal["auto", "latin", "unicode"]

BLEU_TOKENIZERS = ("auto", "13a", "zh", "char", "intl", "ja-mecab", "ko-mecab", "none")
ROUGE_TOKENIZERS = ("auto", "latin", "unicode")

_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff\u0e00-\u0eff\u1780-\u17ff"
"""Scripts that write no spaces between words: Chinese and Japanese, Thai and Lao, Khmer."""
_UNSPACED_LETTER = re.compile(f"[{_UNSPACED}]")
_KANA = re.compile("[\u3040-\u30ff]")
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_SMALL_SHARE = 0.05


@dataclass(frozen=True)
class TextMeasure:
    """One figure.

    Attributes:
        name: Such as `bleu` or `rougeL`.
        value: In percent.
        signature: How it was computed, in the words of its library.
    """

    name: str
    value: float
    signature: str


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """How texts are compared.

    Attributes:
        names: Which measures, of `MEASURES`.
        bleu_tokenizer: sacrebleu's name of what cuts texts into words; auto: `zh` for Chinese, `char` for other scripts
            without spaces, else `13a`.
        rouge_tokenizer: latin: rouge-score's own, which knows only the letters a to z and digits; unicode: words of any
            script, and single characters where it has no spaces; auto: latin, unless it would lose letters.
    """

    names: tuple[str, ...] = ("bleu", "chrf", "rouge", "exact_match")
    bleu_tokenizer: BleuTokenizer = "auto"
    rouge_tokenizer: RougeTokenizer = "auto"

    def __post_init__(self) -> None:
        """Check the names.

        Raises:
            ConfigError: One is unknown.
        """
        for name in self.names:
            if name not in MEASURES:
                raise ConfigError(f"there is no measure {name!r}", hint=f"there are {', '.join(MEASURES)}")


def measure_texts(
    texts: Sequence[str],
    references: Sequence[str],
    options: MeasureOptions | None = None,
    *,
    warn: Callable[[str], None] | None = None,
) -> list[TextMeasure]:
    """Compare texts with what was expected.

    Args:
        texts: What was written.
        references: What was expected, in the same order; at least one.
        options: How; None: as usual.
        warn: Takes warnings about tokenizers that do not fit the script; None: they are logged.

    Raises:
        ConfigError: A library is missing, or there is nothing to compare.
    """
    if not references or len(texts) != len(references):
        raise ConfigError(f"{len(texts)} texts cannot be compared with {len(references)} expected ones")
    options = options or MeasureOptions()
    for message in _misfits(references, options):
        (warn or _log)(message)
    try:
        return [measure for name in options.names for measure in MEASURES[name](texts, references, options)]
    except (ImportError, RuntimeError) as error:  # the latter from sacrebleu, of a tokenizer with packages of its own
        raise ConfigError(f"a library of text measures cannot be loaded: {error}", hint="make setup") from error


def rouge_words(text: str) -> list[str]:
    """Return the words of a text in any script; where there are no spaces between words, its characters.

    For text of ASCII characters these are the words of rouge-score's own tokenizer.
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


class _UnicodeTokenizer:
    """For rouge-score, which asks for a method of this name."""

    def tokenize(self, text: str) -> list[str]:
        """Return the words of a text."""
        return rouge_words(text)


def _bleu(texts: Sequence[str], references: Sequence[str], options: MeasureOptions) -> list[TextMeasure]:
    from sacrebleu.metrics import BLEU

    return [_of_corpus("bleu", BLEU(tokenize=_bleu_tokenizer(references, options)), texts, references)]


def _chrf(texts: Sequence[str], references: Sequence[str], _options: MeasureOptions) -> list[TextMeasure]:
    from sacrebleu.metrics import CHRF

    return [_of_corpus("chrf", CHRF(), texts, references)]


def _ter(texts: Sequence[str], references: Sequence[str], _options: MeasureOptions) -> list[TextMeasure]:
    from sacrebleu.metrics import TER

    unspaced = _share(_UNSPACED_LETTER, references) > _SMALL_SHARE
    return [_of_corpus("ter", TER(normalized=unspaced, asian_support=unspaced), texts, references)]


def _of_corpus(name: str, metric: Any, texts: Sequence[str], references: Sequence[str]) -> TextMeasure:
    score = metric.corpus_score(list(texts), [list(references)])
    return TextMeasure(name, float(score.score), str(metric.get_signature()))


def _rouge(texts: Sequence[str], references: Sequence[str], options: MeasureOptions) -> list[TextMeasure]:
    from importlib.metadata import version

    from rouge_score.rouge_scorer import RougeScorer

    tokenizer = _rouge_tokenizer(references, options)
    names = ["rouge1", "rouge2", "rougeL"]
    if any("\n" in reference.strip() for reference in references):
        names.append("rougeLsum")  # of lines; without them it is rougeL
    scorer = RougeScorer(names, tokenizer=_UnicodeTokenizer() if tokenizer == "unicode" else None)
    scores = [scorer.score(reference, text) for text, reference in zip(texts, references, strict=True)]
    signature = f"f1|tok:{tokenizer}|stem:no|version:{version('rouge-score')}"
    return [
        TextMeasure(name, 100 * sum(score[name].fmeasure for score in scores) / len(scores), signature)
        for name in names
    ]


def _exact_match(texts: Sequence[str], references: Sequence[str], _options: MeasureOptions) -> list[TextMeasure]:
    same = sum(text.strip() == reference.strip() for text, reference in zip(texts, references, strict=True))
    return [TextMeasure("exact_match", 100 * same / len(references), "but for white space at the ends")]


type _Measure = Callable[[Sequence[str], Sequence[str], MeasureOptions], list[TextMeasure]]

MEASURES: Mapping[str, _Measure] = {
    "bleu": _bleu,
    "chrf": _chrf,
    "ter": _ter,
    "rouge": _rouge,
    "exact_match": _exact_match,
}


def _bleu_tokenizer(references: Sequence[str], options: MeasureOptions) -> str:
    if options.bleu_tokenizer != "auto":
        return options.bleu_tokenizer
    if _share(_UNSPACED_LETTER, references) <= _SMALL_SHARE:
        return "13a"
    return "char" if _share(_KANA, references) > _SMALL_SHARE or not _has_chinese(references) else "zh"


def _rouge_tokenizer(references: Sequence[str], options: MeasureOptions) -> str:
    if options.rouge_tokenizer != "auto":
        return options.rouge_tokenizer
    return "unicode" if _lost_share(references) > _SMALL_SHARE else "latin"


def _misfits(references: Sequence[str], options: MeasureOptions) -> list[str]:
    """Say which tokenizers that were asked for do not fit the script."""
    found = []
    unspaced = _share(_UNSPACED_LETTER, references)
    if "bleu" in options.names and options.bleu_tokenizer in ("13a", "intl", "none") and unspaced > _SMALL_SHARE:
        found.append(
            f"BLEU's tokenizer {options.bleu_tokenizer} takes what is between two spaces for a word, but "
            f"{unspaced:.0%} of the letters are of scripts that have none: use zh for Chinese, char for others"
        )
    if "bleu" in options.names and options.bleu_tokenizer == "zh" and unspaced <= _SMALL_SHARE:
        found.append("BLEU's tokenizer zh is for Chinese, which the expected texts are not")
    lost = _lost_share(references)
    if "rouge" in options.names and options.rouge_tokenizer == "latin" and lost > _SMALL_SHARE:
        found.append(
            f"rouge-score's own tokenizer drops {lost:.0%} of the letters, all but a to z: use unicode instead of latin"
        )
    return found


def _log(message: str) -> None:
    logger.warning("%s", message)


def _has_chinese(texts: Sequence[str]) -> bool:
    return any("\u4e00" <= letter <= "\u9fff" for text in texts for letter in text)


def _lost_share(texts: Sequence[str]) -> float:
    """Return which share of the letters rouge-score's tokenizer drops."""
    letters = sum(sum(map(str.isalpha, text)) for text in texts)
    ascii_letters = sum(sum(letter.isalpha() and letter.isascii() for letter in text) for text in texts)
    return 1 - ascii_letters / letters if letters else 0.0


def _share(pattern: re.Pattern[str], texts: Sequence[str]) -> float:
    """Return which share of the letters are of a kind."""
    letters = sum(sum(map(str.isalpha, text)) for text in texts)
    return sum(len(pattern.findall(text)) for text in texts) / letters if letters else 0.0
