"""What generation_config.json says: which tokens end a text, and how they are chosen unless a flag says otherwise."""

import json
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_7b.errors import ConfigError

_FILE = "generation_config.json"
_BEAM_SEARCH = ("num_beams", "length_penalty", "early_stopping")
_APPLIED = ("temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens", *_BEAM_SEARCH)
# Keys without a bearing on which tokens come; `max_length` is the context's business.
_WITHOUT_EFFECT = frozenset(
    {"eos_token_id", "bos_token_id", "pad_token_id", "do_sample", "use_cache", "max_length", "transformers_version"}
    | {"decoder_start_token_id"}
)
_PREFIXES_WITHOUT_EFFECT = ("_", "output_", "return_", "cache_")
# What the others are where they change nothing.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences", "typical_p", "length_penalty"), (1,)),
    **dict.fromkeys(("encoder_repetition_penalty", "guidance_scale"), (1,)),
    "top_h": (1,),
}
# What those are that are applied, where they change nothing.
_OFF: Mapping[str, object] = {
    **dict.fromkeys(("temperature", "top_p", "repetition_penalty", "num_beams", "length_penalty"), 1),
    "top_k": 0,
    "early_stopping": False,
}


@dataclass(frozen=True)
class GenerationSettings:
    """What a model's folder says about generation.

    Attributes:
        stop_ids: Tokens of which each ends a text.
        defaults: Values of `temperature`, `top_k`, `top_p`, `repetition_penalty`, `max_new_tokens`, `num_beams`,
            `length_penalty` and `early_stopping` that are given and change something. A temperature of 0 also stands
            for `"do_sample": false`.
        forced_last_id: Token that a text ends with that has become as long as it may; None: whichever comes.
        decoder_start_id: Token that the decoder of an encoder-decoder begins with; None: the file does not say.
        not_applied: Settings that change the text in transformers and are not applied here, as `name value`.
    """

    stop_ids: frozenset[int] = frozenset()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    forced_last_id: int | None = None
    decoder_start_id: int | None = None
    not_applied: tuple[str, ...] = ()

    def describe(self, applied: Container[str]) -> str | None:
        """Say in one line what comes from the file, given which of the defaults are applied; None if nothing does."""
        parts = [", ".join(f"{name} {_shown(value)}" for name, value in self.defaults.items() if name in applied)]
        if self.not_applied:
            parts.append(f"not applied: {', '.join(self.not_applied)}")
        parts = [part for part in parts if part]
        return f"from {_FILE}: {'; '.join(parts)}" if parts else None


def _shown(value: object) -> str:
    return json.dumps(value) if isinstance(value, bool | str) else f"{value:g}"


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
    content = _read_object(file)
    stop_ids = _ids("eos_token_id", content, file)
    start_ids = _ids("decoder_start_token_id", content, file)
    settings = GenerationSettings(stop_ids, decoder_start_id=min(start_ids, default=None))
    if file.name != _FILE:
        return settings
    forced = _ids("forced_eos_token_id", content, file)
    not_applied = _not_applied(content)
    if len(forced) > 1:
        not_applied.append(f"forced_eos_token_id {json.dumps(sorted(forced))}")
    return replace(
        settings,
        defaults=_defaults(content, file),
        forced_last_id=min(forced) if len(forced) == 1 else None,
        not_applied=tuple(not_applied),
    )


def _read_object(file: Path) -> dict[str, Any]:
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


def _ids(name: str, content: Mapping[str, Any], file: Path) -> frozenset[int]:
    value = content.get(name)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise ConfigError(f"{name} in {file} is {value!r}, expected a token id or a list of them")
    return frozenset(ids)


def _defaults(content: Mapping[str, Any], file: Path) -> dict[str, Any]:
    given = {name: content[name] for name in _APPLIED if content.get(name) is not None}
    for name, value in given.items():
        if name == "early_stopping":
            if value not in (True, False, "never"):
                raise ConfigError(f'{name} in {file} is {value!r}, expected true, false or "never"')
        elif not isinstance(value, int | float) or isinstance(value, bool):
            raise ConfigError(f"{name} in {file} is {value!r}, expected a number")
    if content.get("do_sample") is False:
        given["temperature"] = 0.0
    if _draws_beams(content):
        given = {name: value for name, value in given.items() if name not in _BEAM_SEARCH}
    return {name: value for name, value in given.items() if name not in _OFF or _OFF[name] != value}


def _draws_beams(content: Mapping[str, Any]) -> bool:
    """Whether the tokens of beams would be drawn at random, which is not supported: then there are no beams."""
    return content.get("do_sample") is True


def _not_applied(content: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} {json.dumps(value)}"
        for name, value in content.items()
        if (name not in _APPLIED or (name in _BEAM_SEARCH and _draws_beams(content)))
        and name not in _WITHOUT_EFFECT
        and name != "forced_eos_token_id"
        and not name.startswith(_PREFIXES_WITHOUT_EFFECT)
        and value not in (None, False, 0, [], {}, "")
        and value not in _NEUTRAL.get(name, ())
    ]
