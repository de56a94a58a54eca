"""PEFT's adapter_config.json against the `adapter` section. What an adapter of ours cannot be is refused by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_7b.config.adapters import AdapterConfig
from megatron_7b.errors import ConversionError

_METHODS = {"LORA": "lora", "ADALORA": "adalora"}
_WRITTEN_FOR = "0.21.2"
"""The release of PEFT whose format this is."""
_TASKS = {
    "decoder": "CAUSAL_LM",
    "encoder_decoder": "SEQ_2_SEQ_LM",
    "sequence_classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "question_answering": "QUESTION_ANS",
}
"""PEFT's name of what a model does, by its head or else its kind."""

_HARMLESS = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "runtime_config"),
        *("task_type", "megatron_core", "qalora_group_size", "ephemeral_gpu_offload"),
        *(
            "exclude_modules",
            "fan_in_fan_out",
            "eva_config",
            "layers_to_transform",
            "layers_pattern",
        ),  # what they decided shows in the tensors
    }
)
_OWN = frozenset(
    {
        *("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "use_dora"),
        *("use_rslora", "init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight"),
        *("total_step", "ensure_weight_tying"),
    }
)
_REASONS: Mapping[str, str] = {
    "bias": "biases of the base would be trained as well, and the base is not changed here",
    "lora_bias": "a bias beside B is not part of our adapters",
    "rank_pattern": "all layers of an adapter have one rank here",
    "alpha_pattern": "all layers of an adapter have one alpha here",
    "layer_replication": "it makes another model of the base",
    "trainable_token_indices": "single rows of an embedding are not trained here; modules_to_save trains all of them",
    "target_parameters": "adapters are beside linear layers here",
    "loftq_config": "it replaces the weights of the base",
    "corda_config": "it replaces the weights of the base",
    "lora_ga_config": "it replaces the weights of the base",
    "kasa_config": "it replaces the weights of the base",
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of `init_lora_weights` that take something out of the base's weights."""


@dataclass(frozen=True)
class PeftConfig:
    """What adapter_config.json says that concerns us.

    Attributes:
        adapter: The `adapter` section that it amounts to; `target_modules` as in the file, empty if it has a pattern.
        base: `base_model_name_or_path`; None if it has none.
        is_transposed: The base stores its weights as [in, out].
        ties_copies: A tied module is trained with what it is tied to, even if only one of them is in the file.
        rank_pattern: AdaLoRA: which of the initial ranks each module has kept, by the name of its lora_E.
        total_step: AdaLoRA: steps of the training that its schedule was made for.
    """

    adapter: AdapterConfig
    base: str | None
    is_transposed: bool
    ties_copies: bool
    rank_pattern: Mapping[str, Sequence[bool]]
    total_step: int | None


def read_peft_config(content: Mapping[str, Any]) -> PeftConfig:
    """Read the content of adapter_config.json.

    Raises:
        ConversionError: It describes what an adapter of ours cannot be; every difference is listed with its reason.
    """
    peft_type = content.get("peft_type")
    if not isinstance(peft_type, str) or peft_type not in _METHODS:
        raise ConversionError(
            f"adapter_config.json has peft_type {peft_type!r}, which is not supported; supported are LORA (rank-"
            "stabilised and DoRA included) and ADALORA"
        )
    if problems := list(_differences(content)):
        raise ConversionError(
            "adapter_config.json describes an adapter that cannot be converted exactly:\n  " + "\n  ".join(problems)
        )
    targets, saved = content.get("target_modules"), content.get("modules_to_save") or []
    is_adalora = peft_type == "ADALORA"
    rank_pattern = content.get("rank_pattern") or {}
    for key, names in (("target_modules", targets if isinstance(targets, list) else []), ("modules_to_save", saved)):
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ConversionError(f"adapter_config.json has {key} {names!r}, expected a list of names")
    if not isinstance(rank_pattern, dict):
        raise ConversionError(f"adapter_config.json has rank_pattern {rank_pattern!r}, expected an object")
    if not content.get("r", 1):
        raise ConversionError("adapter_config.json has r 0, expected at least 1")
    adapter = AdapterConfig(
        method="adalora" if is_adalora else "dora" if content.get("use_dora") else "lora",
        rank=_number(content, "r", 8, int),
        alpha=float(_number(content, "lora_alpha", 8, float)),
        target_modules=tuple(sorted(targets)) if isinstance(targets, list) else (),
        dropout=float(_number(content, "lora_dropout", 0.0, float)),
        use_rslora=bool(content.get("use_rslora")),
        modules_to_save=tuple(saved),
        **(_schedule(content) if is_adalora else {}),
    )
    base, total = content.get("base_model_name_or_path"), content.get("total_step")
    name = base if isinstance(base, str) and base else None
    return PeftConfig(
        adapter,
        name,
        is_transposed=bool(content.get("fan_in_fan_out")),
        ties_copies=bool(content.get("ensure_weight_tying")),
        rank_pattern=rank_pattern,
        total_step=total,
    )


def write_peft_config(
    adapter: AdapterConfig,
    *,
    kind: str,
    base: str | None,
    target_modules: Sequence[str],
    modules_to_save: Sequence[str],
    is_transposed: bool,
    rank_pattern: Mapping[str, Sequence[bool]] | None = None,
    total_step: int | None = None,
) -> dict[str, object]:
    """Write the content of adapter_config.json.

    Args:
        adapter: The run's section.
        kind: Of the model.
        base: What the base is called; None if it has no name elsewhere.
        target_modules: Names that match the modules that have an adapter, and no other module.
        modules_to_save: The same of modules that are trained as a whole.
        is_transposed: The base stores its weights as [in, out], as GPT-2 does.
        rank_pattern: AdaLoRA's.
        total_step: AdaLoRA's.
    """
    config: dict[str, object] = {
        "peft_type": "ADALORA" if adapter.method == "adalora" else "LORA",
        "peft_version": _WRITTEN_FOR,
        "task_type": _TASKS.get(kind),
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": list(target_modules),
        "modules_to_save": list(modules_to_save) or None,
        "fan_in_fan_out": is_transposed,
        "use_dora": adapter.method == "dora",
        "use_rslora": adapter.use_rslora,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
    }
    if adapter.method == "adalora":
        config |= {theirs: getattr(adapter, ours) for theirs, ours in _SCHEDULE.items()}
        config |= {"total_step": total_step, "rank_pattern": dict(rank_pattern) if rank_pattern else None}
    return config


_SCHEDULE = {
    "init_r": "initial_rank",
    "target_r": "target_rank",
    "tinit": "tinit",
    "tfinal": "tfinal",
    "deltaT": "delta_t",
    "beta1": "beta1",
    "beta2": "beta2",
    "orth_reg_weight": "orth_reg_weight",
}


def _schedule(content: Mapping[str, Any]) -> dict[str, Any]:
    defaults = AdapterConfig()
    given = {theirs: getattr(defaults, ours) for theirs, ours in _SCHEDULE.items()}
    return {
        _SCHEDULE[theirs]: _number(content, theirs, default, int if isinstance(default, int) else float)
        for theirs, default in given.items()
    }


def _differences(content: Mapping[str, Any]) -> list[str]:
    problems = []
    initial = content.get("init_lora_weights", True)
    if isinstance(initial, str) and initial.lower().startswith(_CHANGES_BASE):
        problems.append(
            f"init_lora_weights is {initial!r}: it takes something out of the base's weights; save it with "
            "path_initial_model_for_weight_conversion, as PEFT's documentation has it"
        )
    is_adalora = content.get("peft_type") == "ADALORA"
    for key, value in sorted(content.items()):
        if key in _HARMLESS or key in _OWN or key == "init_lora_weights":
            continue
        if not value or (key == "bias" and value == "none") or (key == "rank_pattern" and is_adalora):
            continue
        reason = _REASONS.get(key, "this is not known here")
        shown = repr(value)
        problems.append(f"{key} is {shown if len(shown) <= 60 else shown[:57] + '...'}: {reason}")
    return problems


def _number(content: Mapping[str, Any], key: str, default: float, kind: type) -> Any:
    value = content.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float) or value < 0:
        raise ConversionError(f"adapter_config.json has {key} {value!r}, expected a number of at least 0")
    return value
