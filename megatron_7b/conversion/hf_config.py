"""Hugging Face's config.json against `ModelConfig`. What the model cannot represent is refused, all of it at once.

Reads what transformers 4 and 5 write (`rope_theta` and `rope_scaling`, or `rope_parameters`) and writes a file that
both read.
"""

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from megatron_7b.config.architectures import ARCHITECTURES, others_with
from megatron_7b.config.schema import ModelConfig, RopeScalingConfig
from megatron_7b.conversion.families import FAMILIES, Family
from megatron_7b.errors import ConversionError

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_READ_ONLY_KEYS = frozenset({"layer_types", "partial_rotary_factor", "original_max_position_embeddings"})
"""Keys that are read and then written in another form."""


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids that Hugging Face keeps in its configurations. None: there is none."""

    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None


def from_hugging_face_config(
    config: Mapping[str, object], *, max_position_embeddings: int | None = None
) -> ModelConfig:
    """Read the shape of a model from the content of config.json.

    Args:
        config: Parsed config.json.
        max_position_embeddings: Replaces the context length, to convert a model with a sliding window for sequences
            within the window, where the window has no effect.

    Returns:
        The model, with `vocab_size` set to the rows of the embedding.

    Raises:
        ConversionError: The architecture is unknown, or keys have impossible values or ask for what the model cannot
            represent; all of them are listed.
    """
    family = _family(config)
    values = {**family.defaults, **config}
    reader = _Reader(values)
    rope = _rope_parameters(values)
    model = ModelConfig(
        architecture=family.model_type,
        num_layers=reader.integer("num_hidden_layers"),
        hidden_size=reader.integer("hidden_size"),
        ffn_hidden_size=reader.integer("intermediate_size"),
        num_attention_heads=reader.integer("num_attention_heads"),
        num_query_groups=reader.optional_integer("num_key_value_heads"),
        kv_channels=_head_width(reader),
        vocab_size=reader.integer("vocab_size"),
        max_position_embeddings=max_position_embeddings or reader.integer("max_position_embeddings"),
        rotary_base=_Reader(rope, reader.problems, "rope_parameters.").number("rope_theta", positive=True),
        rope_scaling=_rope_scaling(rope, values, reader.problems),
        norm_epsilon=reader.number("rms_norm_eps", positive=True),
        share_embeddings_and_output_weights=reader.flag("tie_word_embeddings"),
        **cast(Any, ARCHITECTURES[family.model_type].fixed),
        attention_dropout=reader.number("attention_dropout", default=0.0),
        init_method_std=reader.number("initializer_range"),
    )
    problems = [*reader.problems, *_unrepresentable(values, family)]
    if not reader.problems:
        problems += [*_impossible_heads(model), *_window_problems(values, family, model)]
    if problems:
        raise ConversionError(
            "config.json describes a model that cannot be converted exactly:\n  " + "\n  ".join(problems)
        )
    return model


def to_hugging_face_config(
    model: ModelConfig,
    *,
    vocab_size: int,
    dtype: str,
    special_tokens: SpecialTokens | None = None,
    imported: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """Write the content of config.json.

    Args:
        model: Shape of the model.
        vocab_size: True vocabulary size.
        dtype: What the weights are stored in, in torch's spelling: "float32", "bfloat16".
        special_tokens: Ids for generation; None leaves all of them out.
        imported: The config.json that the weights came with: what it says beyond the shape of the model is kept, the
            ids for generation included.

    Raises:
        ConversionError: No Hugging Face architecture of the model's family computes what the model computes.
    """
    check_exportable(model)
    family = FAMILIES[model.architecture]
    special_tokens = special_tokens or SpecialTokens()
    config: dict[str, object] = {
        "architectures": [family.class_name],
        "model_type": family.model_type,
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "head_dim": model.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position_embeddings,
        "initializer_range": model.init_method_std,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.share_embeddings_and_output_weights,
        "attention_dropout": model.attention_dropout,
        **_rope_keys(model),
        **dict.fromkeys(family.refused_flags, False),
        "use_cache": True,
        "bos_token_id": special_tokens.bos_token_id,
        "eos_token_id": special_tokens.eos_token_id,
        "pad_token_id": special_tokens.pad_token_id,
        "dtype": dtype,
        "torch_dtype": dtype,  # the spelling before transformers 4.56
        "transformers_version": importlib.metadata.version("transformers"),
    }
    if family.sliding_window != "none":
        config["sliding_window"] = None  # left out, transformers would assume a window of 4096
    if family.sliding_window == "some layers":
        config["use_sliding_window"] = False
        config["max_window_layers"] = model.num_layers
    return config if imported is None else _with_foreign_keys(config, imported)


def _with_foreign_keys(config: Mapping[str, object], imported: Mapping[str, object]) -> dict[str, object]:
    """Add the keys of an imported config.json that this module neither reads nor writes, and take its token ids."""
    # max_window_layers says nothing where use_sliding_window is false, which it is in every export.
    written_if_absent = {"use_cache", "max_window_layers", *_TOKEN_IDS}
    owned = (config.keys() - written_if_absent) | _READ_ONLY_KEYS | _all_refused_flags()
    # transformers' notes on how it made the object in memory begin with an underscore.
    foreign = {key: value for key, value in imported.items() if key not in owned and not key.startswith("_")}
    return {**{key: value for key, value in config.items() if key not in _TOKEN_IDS}, **foreign}


def _all_refused_flags() -> frozenset[str]:
    return frozenset(flag for family in FAMILIES.values() for flag in family.refused_flags)


def to_generation_config(special_tokens: SpecialTokens) -> dict[str, object]:
    """Write the content of generation_config.json: the ids that start, end and fill a text."""
    ids = {
        "bos_token_id": special_tokens.bos_token_id,
        "eos_token_id": special_tokens.eos_token_id,
        "pad_token_id": special_tokens.pad_token_id,
    }
    present: dict[str, object] = {name: value for name, value in ids.items() if value is not None}
    return {**present, "transformers_version": importlib.metadata.version("transformers")}


def check_exportable(model: ModelConfig) -> None:
    """Check that the model's Hugging Face family computes exactly what the model computes.

    Raises:
        ConversionError: It does not; every difference is listed.
    """
    family = FAMILIES.get(model.architecture)
    if family is None:
        raise ConversionError(
            f"model.architecture is {model.architecture}, which cannot be written as a Hugging Face folder yet; these "
            f"can: {', '.join(FAMILIES)}"
        )
    problems = []
    for feature, wanted in ARCHITECTURES[model.architecture].fixed.items():
        given = getattr(model, feature)
        if wanted != given:
            fitting = others_with(model.architecture, feature, given)
            problems.append(f"model.{feature} is {given}, {family.class_name} has {wanted} ({given}: {fitting})")
    if family.model_type == "llama" and model.hidden_size % model.num_attention_heads:
        problems.append(
            f"model.hidden_size {model.hidden_size} is not a multiple of model.num_attention_heads "
            f"{model.num_attention_heads}, which LlamaConfig demands (mistral, qwen3: any head width)"
        )
    if problems:
        raise ConversionError(
            f"the model cannot be written as {family.class_name}:\n  " + "\n  ".join(problems),
            hint="model.architecture must be the family whose computation the model was trained with",
        )


def _family(config: Mapping[str, object]) -> Family:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConversionError(
            f"config.json has model_type {model_type!r}, which is not supported; supported are {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


class _Reader:
    """Reads typed values, collecting complaints instead of stopping at the first."""

    def __init__(self, values: Mapping[str, object], problems: list[str] | None = None, prefix: str = "") -> None:
        self._values = values
        self._prefix = prefix
        self.problems: list[str] = [] if problems is None else problems

    def integer(self, key: str) -> int:
        value = self._values.get(key)
        return cast(int, self._checked(key, value, _is_positive_integer, "a positive integer", 1))

    def optional_integer(self, key: str) -> int | None:
        return None if self._values.get(key) is None else self.integer(key)

    def number(self, key: str, *, positive: bool = False, default: float | None = None) -> float:
        value = self._values.get(key)
        if value is None and default is not None:
            return default
        minimum = "greater than 0" if positive else "at least 0"
        value = self._checked(key, value, lambda v: _is_number(v, positive=positive), f"a number {minimum}", 1.0)
        return float(cast(float, value))

    def flag(self, key: str) -> bool:
        value = self._values.get(key)
        return bool(self._checked(key, value, lambda v: isinstance(v, bool), "true or false", False))

    def _checked(
        self, key: str, value: object, is_valid: Callable[[object], bool], expected: str, stand_in: object
    ) -> object:
        if is_valid(value):
            return value
        self.problems.append(f"{self._prefix}{key} is {value!r}, expected {expected}")
        return stand_in


def _head_width(reader: _Reader) -> int | None:
    """The width of a head, None where it is hidden_size / num_attention_heads, so that one model has one form."""
    width = reader.optional_integer("head_dim")
    regular = width is not None and width * reader.integer("num_attention_heads") == reader.integer("hidden_size")
    return None if regular else width


def _is_positive_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: object, *, positive: bool) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return value > 0 if positive else value >= 0


def _unrepresentable(values: Mapping[str, object], family: Family) -> list[str]:
    problems = []
    architectures = values.get("architectures")
    if architectures and architectures != [family.class_name]:
        problems.append(f"architectures is {architectures!r}, only [{family.class_name!r}] can be converted")
    if values.get("hidden_act") not in ("silu", "swish"):
        problems.append(f"hidden_act is {values.get('hidden_act')!r}, only 'silu' (SwiGLU) can be represented")
    problems.extend(
        f"{flag} is {values[flag]!r}: biases beyond query, key and value cannot be represented"
        for flag in family.refused_flags
        if values.get(flag)
    )
    auto_map = values.get("auto_map")
    own_code = [name for name in auto_map if name != "AutoTokenizer"] if isinstance(auto_map, Mapping) else []
    if own_code:
        problems.append(
            f"auto_map names code of the folder for {', '.join(own_code)}, which is never run, so what it computes is "
            f"not known; without auto_map the model is converted as {family.class_name}"
        )
    if values.get("quantization_config"):
        problems.append("quantization_config is set: quantised weights are not converted, use the original ones")
    return problems


def _impossible_heads(model: ModelConfig) -> list[str]:
    problems = []
    groups = model.query_groups
    if model.num_attention_heads % groups:
        problems.append(
            f"num_attention_heads {model.num_attention_heads} is not a multiple of num_key_value_heads {groups}"
        )
    if model.kv_channels is None and model.hidden_size % model.num_attention_heads:
        problems.append(
            f"hidden_size {model.hidden_size} is not a multiple of num_attention_heads {model.num_attention_heads}, "
            "and head_dim is not given"
        )
    return problems


def _window_problems(values: Mapping[str, object], family: Family, model: ModelConfig) -> list[str]:
    """A sliding window is no obstacle where no sequence can be longer than it."""
    window = values.get("sliding_window")
    layers = _windowed_layers(values, family, model.num_layers)
    if family.sliding_window == "some layers" and (window is None or not values.get("use_sliding_window")):
        named = values.get("layer_types")
        others = sorted({str(kind) for kind in named} - {"full_attention"}) if isinstance(named, list) else []
        if others:
            return [f"layer_types has {', '.join(others)}, but no sliding_window is in use: one contradicts the other"]
    if not layers or window is None:
        return []
    if not _is_positive_integer(window):
        return [f"sliding_window is {window!r}, expected a positive integer or null"]
    if cast(int, window) >= model.max_position_embeddings:
        return []
    problem = (
        f"sliding_window is {window} in {layers} of {model.num_layers} layers, below max_position_embeddings "
        f"{model.max_position_embeddings}: windowed attention cannot be represented "
        f"(--max-position-embeddings {window} converts the model exactly for sequences up to that length)"
    )
    return [problem]


def _windowed_layers(values: Mapping[str, object], family: Family, num_layers: int) -> int:
    """Number of layers that attend within the window only.

    Source: the `__post_init__` of transformers 5's MistralConfig, Qwen2Config and Qwen3Config.
    """
    if family.sliding_window == "none":
        return 0
    if family.sliding_window == "all layers":
        return num_layers
    if not values.get("use_sliding_window"):
        return 0
    layer_types = values.get("layer_types")
    if isinstance(layer_types, list):
        return sum(layer_type != "full_attention" for layer_type in layer_types)
    first = values.get("max_window_layers")
    return max(0, num_layers - first) if isinstance(first, int) else num_layers


def _rope_parameters(values: Mapping[str, object]) -> dict[str, object]:
    """One dictionary out of the spellings of transformers 4 and 5, with transformers' precedence.

    Source: `RotaryEmbeddingConfigMixin.convert_rope_params_to_dict`, transformers 5.23.
    """
    given = values.get("rope_scaling") or values.get("rope_parameters") or {}
    parameters = dict(given) if isinstance(given, Mapping) else {"rope_type": given}
    parameters.setdefault("rope_theta", values["rope_theta"])
    parameters.setdefault("rope_type", parameters.get("type", "default"))
    if values.get("partial_rotary_factor") is not None:
        parameters.setdefault("partial_rotary_factor", values["partial_rotary_factor"])
    return parameters


def _rope_scaling(
    rope: Mapping[str, object], values: Mapping[str, object], problems: list[str]
) -> RopeScalingConfig | None:
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        problems.append(f"partial_rotary_factor is {rope['partial_rotary_factor']!r}, only 1 can be represented")
    if any(isinstance(value, Mapping) for value in rope.values()):
        problems.append("rope_parameters differ between layer types, which cannot be represented")
        return None
    if rope["rope_type"] == "default":
        return None
    if rope["rope_type"] != "llama3":
        problems.append(
            f"rope_parameters.rope_type is {rope['rope_type']!r}, only 'default' and 'llama3' are supported"
        )
        return None
    # transformers prefers the top-level key, and falls back to the context length.
    original = values.get("original_max_position_embeddings", rope.get("original_max_position_embeddings"))
    original = values["max_position_embeddings"] if original is None else original
    reader = _Reader({**rope, "original_max_position_embeddings": original}, problems, "rope_parameters.")
    return RopeScalingConfig(
        factor=reader.number("factor", positive=True),
        low_freq_factor=reader.number("low_freq_factor", positive=True),
        high_freq_factor=reader.number("high_freq_factor", positive=True),
        original_max_position_embeddings=reader.integer("original_max_position_embeddings"),
    )


def _rope_keys(model: ModelConfig) -> dict[str, object]:
    scaling = model.rope_scaling
    parameters: dict[str, object] = {"rope_type": "default"}
    if scaling is not None:
        parameters = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    return {
        "rope_parameters": {**parameters, "rope_theta": model.rotary_base},
        # What transformers 4 and servers built on it read.
        "rope_theta": model.rotary_base,
        "rope_scaling": None if scaling is None else parameters,
    }
