"""Records of a source and a target: what a model is given, as a prompt, and what it has to write."""

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_7b.data.records.reading import text_of
from megatron_7b.errors import ConfigError

NAME = "pairs of source and target"
EXAMPLE = '{"source": "…", "target": "…"}'

DEFAULT_TEMPLATES: Mapping[str, str] = {"encoder_decoder": "{source}", "decoder": "{source}\n"}
"""By the kind of model: a decoder has to see where the source ends."""


@dataclass(frozen=True)
class SourceTarget:
    """What one record says.

    Attributes:
        fields: The texts that the prompt is made of, by key.
        target: What has to be written; None where it is not known.
    """

    fields: Mapping[str, str]
    target: str | None


class PromptTemplate:
    """A text with the keys of a record in braces; doubled braces are braces.

    Args:
        text: Such as `Translate into German: {source}`.
        target_key: The key of what has to be written.

    Raises:
        ConfigError: It has no key, or names the target, or its braces do not match.
    """

    def __init__(self, text: str, target_key: str) -> None:
        try:
            pieces = list(string.Formatter().parse(text))
        except ValueError as error:
            raise _refused(text, str(error).lower()) from None
        self.text = text
        self.target_key = target_key
        self._pieces = [(literal, key) for literal, key, *_ in pieces]
        self.keys = tuple(dict.fromkeys(key for _, key in self._pieces if key is not None))
        if any(form or conversion for *_, form, conversion in pieces) or "" in self.keys:
            raise _refused(text, "only keys may be in braces")
        if not self.keys:
            raise _refused(text, "it names no key of the records")
        if target_key in self.keys:
            raise _refused(text, f"it shows the target, {{{target_key}}}, which the model has to write")

    def read(self, record: Mapping[str, Any], *, needs_target: bool = True) -> SourceTarget:
        """Return what a record says.

        Raises:
            RecordError: A text is missing or empty.
        """
        fields = {key: text_of(dict(record), key) for key in self.keys}
        wants = needs_target or self.target_key in record
        return SourceTarget(fields, text_of(dict(record), self.target_key) if wants else None)

    def fill(self, fields: Mapping[str, str]) -> str:
        """Return the prompt with these texts in the places of their keys."""
        return "".join(literal + (fields[key] if key is not None else "") for literal, key in self._pieces)

    def fitted(self, fields: Mapping[str, str], encode: Callable[[str], Sequence[int]], room: int) -> str | None:
        """Return the longest prompt that fits: if need be, the longest of its texts loses its end.

        Args:
            fields: As in a `SourceTarget`.
            encode: What makes tokens of a whole prompt.
            room: Most tokens.

        Returns:
            None if not even a prompt without that text fits.
        """
        whole = self.fill(fields)
        if len(encode(whole)) <= room:
            return whole
        longest = max(self.keys, key=lambda key: len(fields[key]))
        found = None
        fits, too_long = -1, len(fields[longest])
        while too_long - fits > 1:
            length = (fits + too_long) // 2
            prompt = self.fill({**fields, longest: fields[longest][:length]})
            if len(encode(prompt)) <= room:
                fits, found = length, prompt
            else:
                too_long = length
        return found


def read_template(text: str | None, target_key: str, kind: str) -> PromptTemplate:
    """Return the template that a configuration names, or the usual one of a kind of model.

    Raises:
        ConfigError: As for `PromptTemplate`.
    """
    return PromptTemplate(DEFAULT_TEMPLATES[kind] if text is None else text, target_key)


def _refused(text: str, why: str) -> ConfigError:
    return ConfigError(
        f"finetune.prompt_template is {text!r}: {why}",
        hint="name keys of the records in braces, such as '{source}'; a brace itself is written twice",
    )
