"""Hugging Face's config.json against `ModelConfig`. What the model cannot represent is refused, all of it at once."""

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from megatron_7b.config.architectures import ARCHITECTURES, others_with
from megatron_7b.config.schema import ModelConfig
from megatron_7b.conversion.config_values import ValueReader
from megatron_7b.conversion.families import FAMILIES, Family
from megatron_7b.conversion.heads import head_classes, read_head, write_head
from megatron_7b.errors import ConversionError

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids that Hugging Face keeps in its configurations. None: there is none."""

    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    decoder_start_token_id: int | None = None


def from_hugging_face_config(
    config: Mapping[str, object], *, max_position_embeddings: int | None = None
) -> ModelConfig:
    """Read the shape of a model from the content of config.json.

    Args:
        config: Parsed config.json.
        max_position_embeddings: Replaces the context length; a window that is no shorter is then left out.

    Returns:
        The model, with `vocab_size` set to the rows of the embedding.

    Raises:
        ConversionError: The architecture is unknown, or keys have impossible values or ask for what the model cannot
            represent; all of them are listed.
    """
    family = _family(config)
    values = {**family.codec.defaults, **config}
    reader = ValueReader(values)
    model = family.codec.read(values, reader, architecture=family.model_type, context=max_position_embeddings)
    if family.pair_class is not None:
        model = replace(model, add_binary_head=values.get("architectures") == [family.pair_class])
    model, head_problems = _with_head(model, values, family)
    problems = [
        *reader.problems,
        *head_problems,
        *_unrepresentable(values, family),
        *family.codec.unrepresentable(values),
    ]
    if not reader.problems:
        problems += family.codec.impossible(values, model)
    if problems:
        raise ConversionError(
            "config.json describes a model that cannot be converted exactly:\n  " + "\n  ".join(problems)
        )
    return model


def _with_head(model: ModelConfig, values: Mapping[str, object], family: Family) -> tuple[ModelConfig, list[str]]:
    """Return a model with the head that the class of its folder has, and what is wrong with that."""
    match values.get("architectures"):
        case [str(name)] if name in (classes := _head_classes(family)):
            fields, problems = read_head(values, classes[name])
            return replace(model, **cast(Any, fields)), problems
        case _:
            return model, []


def _head_classes(family: Family) -> dict[str, str]:
    return {} if family.prefix is None else head_classes(family.prefix)


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
        "architectures": [family.class_of(model)],
        "model_type": family.model_type,
        "vocab_size": vocab_size,
        **family.codec.write(model),
        **write_head(model),
        "use_cache": True,
        **_token_ids(model, special_tokens),
        "dtype": dtype,
        "torch_dtype": dtype,  # the spelling before transformers 4.56
        "transformers_version": importlib.metadata.version("transformers"),
    }
    return config if imported is None else _with_foreign_keys(config, imported, family)


def _with_foreign_keys(
    config: Mapping[str, object], imported: Mapping[str, object], family: Family
) -> dict[str, object]:
    """Add the keys of an imported config.json that this module neither reads nor writes, and take its token ids."""
    written_if_absent = {"use_cache", *_TOKEN_IDS}
    if not config.get("use_sliding_window"):  # and where that is false, max_window_layers says nothing
        written_if_absent.add("max_window_layers")
    owned = (config.keys() - written_if_absent) | family.codec.read_only_keys
    # transformers' notes on how it made the object in memory begin with an underscore.
    foreign = {key: value for key, value in imported.items() if key not in owned and not key.startswith("_")}
    return {**{key: value for key, value in config.items() if key not in _TOKEN_IDS}, **foreign}


def to_generation_config(special_tokens: SpecialTokens) -> dict[str, object]:
    """Write the content of generation_config.json: the ids that start, end and fill a text."""
    ids = {name: getattr(special_tokens, name) for name in _TOKEN_IDS}
    present: dict[str, object] = {name: value for name, value in ids.items() if value is not None}
    return {**present, "transformers_version": importlib.metadata.version("transformers")}


def _token_ids(model: ModelConfig, special_tokens: SpecialTokens) -> dict[str, object]:
    """Return the ids that config.json has of an architecture."""
    left_out = () if model.traits.kind == "encoder_decoder" else ("decoder_start_token_id",)
    return {name: getattr(special_tokens, name) for name in _TOKEN_IDS if name not in left_out}


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
    problems += family.codec.unwritable(model)
    if problems:
        raise ConversionError(
            f"the model cannot be written as {family.class_name}:\n  " + "\n  ".join(problems),
            hint="model.architecture must be the family whose computation the model was trained with",
        )


def _family(config: Mapping[str, object]) -> Family:
    """Return the family of a folder.

    Args:
        config: Parsed config.json.

    Raises:
        ConversionError: It is not supported.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        supported = ", ".join(dict.fromkeys(family.model_type for family in FAMILIES.values()))
        raise ConversionError(
            f"config.json has model_type {model_type!r}, which is not supported; supported are {supported}"
        )
    return FAMILIES[model_type]


def _unrepresentable(values: Mapping[str, object], family: Family) -> list[str]:
    problems = []
    architectures, possible = (
        values.get("architectures"),
        [[name] for name in (family.class_name, *family.other_classes, *_head_classes(family))],
    )
    if architectures and architectures not in possible:
        problems.append(f"architectures is {architectures!r}, only {' or '.join(map(str, possible))} can be converted")
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
