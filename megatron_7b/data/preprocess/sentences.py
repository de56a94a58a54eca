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

    Raises:
        ConfigError: Nltk is not installed, or takes the language for no name.
        DataFormatError: No installed model, and the corpus has no text to learn from.
    """
    if language in _WITHOUT_SPACES:
        return split_without_spaces, f"the marks that end them in {language}"
    try:
        from nltk.tokenize.punkt import PunktSentenceTokenizer, PunktTokenizer
    except ImportError as error:
        raise ConfigError("--split-sentences needs nltk", hint="pip install nltk") from error
    try:
        splitter: Any = PunktTokenizer(language)
        origin = f"nltk_data's model for {language}"
    except ValueError as error:
        raise ConfigError(f"--lang {language} is no name of a language, such as english: {error}") from error
    except LookupError:
        parameters, characters = _learn(_read_texts(sources, key, text_documents))
        splitter = PunktSentenceTokenizer(parameters)
        origin = f"learned from the corpus's first {characters:,} characters (no nltk_data for {language})"

    def split(text: str) -> list[str]:
        return list(splitter.tokenize(text))

    return split, origin


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
