"""Sentence borders: by nltk's Punkt, from an installed model or one learned from the corpus itself; never a download.

Punkt asks whether a `.`, `?` or `!` before a space ends a sentence. Chinese and Japanese have no spaces, and marks of
their own that end sentences and do nothing else, so there a rule is enough.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_7b.data.reading.blocks import TextDocuments
from megatron_7b.data.reading.records import parse_block
from megatron_7b.data.reading.sources import Source
from megatron_7b.errors import ConfigError, DataFormatError

_TRAINING_CHARACTERS = 20_000_000
"""Punkt's counts hardly change beyond this."""

_WITHOUT_SPACES = frozenset({"chinese", "japanese"})
_PUNKT = {
    "cs": "czech", "da": "danish", "nl": "dutch", "en": "english", "et": "estonian", "fi": "finnish", "fr": "french",
    "de": "german", "el": "greek", "it": "italian", "ml": "malayalam", "no": "norwegian", "pl": "polish",
    "pt": "portuguese", "ru": "russian", "sl": "slovene", "es": "spanish", "sv": "swedish", "tr": "turkish",
}  # fmt: skip
"""Languages of nltk_data's punkt_tab, by their codes of ISO 639-1."""
_BY_CODE = {**_PUNKT, "zh": "chinese", "ja": "japanese"}

LEARNED = "learned"
"""In place of a language: borders are learned from the corpus, even where a model is installed."""
_ENDS = re.compile(
    r"""(?:[。！？｡]              # one mark or several: ？！
         |[!?](?![A-Za-z0-9/=&])  # but not that of an address
         |…{2,})+                 # a single one is a pause
        [」』”’）】》〉〕］｝]*    # what was opened within the sentence ends with it
        |\n""",
    re.VERBOSE,
)


def build_sentence_splitter(
    sources: Sequence[Source], key: str, language: str, text_documents: TextDocuments
) -> tuple[Callable[[str], list[str]], str]:
    """Return a function from text to sentences, and where its model comes from, in words.

    Args:
        sources: The corpus, which Punkt learns from where no model is installed.
        key: Key of a record that holds the text.
        language: Its English name, its code of ISO 639-1, the name of an installed Punkt model, or `LEARNED`.
        text_documents: What a document of a text file is.

    Raises:
        ConfigError: Nltk is not installed, or the language is unknown.
        DataFormatError: No installed model, and the corpus has no text to learn from.
    """
    language = _BY_CODE.get(language, language)
    if language in _WITHOUT_SPACES:
        return split_without_spaces, f"the marks that end them in {language}"
    try:
        from nltk.tokenize.punkt import PunktSentenceTokenizer
    except ImportError as error:
        raise ConfigError("--split-sentences needs nltk", hint="pip install nltk") from error
    splitter: Any = None if language == LEARNED else _installed(language)
    origin = f"nltk_data's model for {language}"
    if splitter is None:
        parameters, characters = _learn(_read_texts(sources, key, text_documents))
        splitter = PunktSentenceTokenizer(parameters)
        why = "" if language == LEARNED else f" (no nltk_data for {language})"
        origin = f"learned from the corpus's first {characters:,} characters{why}"

    def split(text: str) -> list[str]:
        return list(splitter.tokenize(text))

    return split, origin


def _installed(language: str) -> Any:
    """Return nltk_data's tokenizer for a language; None if it is not installed.

    Raises:
        ConfigError: Nothing of that name is installed, nor does nltk_data have it.
    """
    from nltk.tokenize.punkt import PunktTokenizer

    try:
        return PunktTokenizer(language)
    except (ValueError, LookupError) as error:  # no name of a folder; no such folder
        if language in _PUNKT.values():
            return None
        known = ", ".join(f"{name} ({code})" for code, name in sorted(_BY_CODE.items(), key=lambda one: one[1]))
        raise ConfigError(
            f"--lang is {language!r}, expected a Punkt model of nltk_data, or one of {known}",
            hint=f"for any other language that ends sentences with . ? ! and a space: --lang {LEARNED} learns its "
            "abbreviations from the corpus",
        ) from error


def split_without_spaces(text: str) -> list[str]:
    """Return the sentences of a Chinese or Japanese text without the space around them; lines end sentences, too."""
    sentences, start = [], 0
    for end in _ENDS.finditer(text):
        stop = end.end()
        # Straight quotes look alike on both sides: this one closes if one is open.
        if text[stop : stop + 1] == '"' and text.count('"', start, stop) % 2:
            stop += 1
        sentences.append(text[start:stop])
        start = stop
    return [stripped for sentence in (*sentences, text[start:]) if (stripped := sentence.strip())]


def _learn(texts: Iterable[str]) -> tuple[Any, int]:
    from nltk.tokenize.punkt import PunktTrainer

    trainer = PunktTrainer()
    characters = 0
    for text in texts:
        trainer.train(text, finalize=False)
        characters += len(text)
        if characters >= _TRAINING_CHARACTERS:
            break
    if not characters:
        raise DataFormatError("--split-sentences: the corpus has no text to learn sentence borders from")
    return trainer.get_params(), characters


def _read_texts(sources: Sequence[Source], key: str, text_documents: TextDocuments) -> Iterable[str]:
    # Fresh sources: reading here must not count as progress, nor enter the hashes.
    for source in sources:
        for block in Source(Path(source.path)).read_blocks([key], text_documents, 1 << 20):
            yield from parse_block(block, [key]).texts[0]
