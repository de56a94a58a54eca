"""What generation_config.json says: which tokens end a text, and how they are chosen unless a flag says otherwise."""

import json
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_7b.errors import ConfigError

_FILE = "generation_config.json"
_APPLIED = ("temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens")
# Keys without a bearing on which tokens come; `max_length` is the context's business.
_WITHOUT_EFFECT = frozenset(
    {"eos_token_id", "bos_token_id", "pad_token_id", "do_sample", "use_cache", "max_length", "transformers_version"}
)
_PREFIXES_WITHOUT_EFFECT = ("_", "output_", "return_", "cache_")
# What the others are where they change nothing.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences", "typical_p", "length_penalty"), (1,)),
    **dict.fromkeys(("encoder_repetition_penalty", "guidance_scale"), (1,)),
    "early_stopping": (True,),
    "top_h": (1,),
}


@dataclass(frozen=True)
class GenerationSettings:
    """What a model's folder says about generation.

    Attributes:
        stop_ids: Tokens of which each ends a text.
        defaults: Values of `temperature`, `top_k`, `top_p`, `repetition_penalty` and `max_new_tokens` that are given
            and change something. A temperature of 0 also stands for `"do_sample": false`.
        not_applied: Settings that change the text in transformers and are not applied here, as `name value`.
    """

    stop_ids: frozenset[int] = frozenset()
    defaults: Mapping[str, float | int] = field(default_factory=dict)
    not_applied: tuple[str, ...] = ()

    def describe(self, applied: Container[str]) -> str | None:
        """Say in one line what comes from the file, given which of the defaults are applied; None if nothing does."""
        parts = [", ".join(f"{name} {value:g}" for name, value in self.defaults.items() if name in applied)]
        if self.not_applied:
            parts.append(f"not applied: {', '.join(self.not_applied)}")
        parts = [part for part in parts if part]
        return f"from {_FILE}: {'; '.join(parts)}" if parts else None


def read_generation_settings(hugging_face: Path | None) -> GenerationSettings:
    """Read what an imported folder says.

    Args:
        hugging_face: The imported files that a checkpoint carries; None if it carries none.

    Raises:
        ConfigError: A file is damaged, or a value has another type than transformers gives it.
    """
    if hugging_face is None:
        return GenerationSettings()
    file = next((hugging_face / name for name in (_FILE, "config.json") if (hugging_face / name).is_file()), None)
    if file is None:
        return GenerationSettings()
    content = read_json_object(file)
    stop_ids = _stop_ids(content.get("eos_token_id"), file)
    if file.name != _FILE:
        return GenerationSettings(stop_ids)
    return GenerationSettings(stop_ids, _defaults(content, file), tuple(_not_applied(content)))


def read_json_object(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ConfigError: The file is damaged, or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds a {type(content).__name__}, expected a JSON object")
    return content


def _stop_ids(value: object, file: Path) -> frozenset[int]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise ConfigError(f"eos_token_id in {file} is {value!r}, expected a token id or a list of them")
    return frozenset(ids)


def _defaults(content: Mapping[str, Any], file: Path) -> dict[str, float | int]:
    given = {name: content[name] for name in _APPLIED if content.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ConfigError(f"{name} in {file} is {value!r}, expected a number")
    if content.get("do_sample") is False:
        given["temperature"] = 0.0
    neutral = {"temperature": 1, "top_k": 0, "top_p": 1, "repetition_penalty": 1}
    return {name: value for name, value in given.items() if neutral.get(name) != value}


def _not_applied(content: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} {json.dumps(value)}"
        for name, value in content.items()
        if name not in _APPLIED
        and name not in _WITHOUT_EFFECT
        and not name.startswith(_PREFIXES_WITHOUT_EFFECT)
        and value not in (None, False, 0, [], {}, "")
        and value not in _NEUTRAL.get(name, ())
    ]
