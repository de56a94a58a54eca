"""Windows of attention in config.json: of which size, and in which layers."""

from collections.abc import Mapping
from typing import Literal, cast

from megatron_7b.config.schema import ModelConfig
from megatron_7b.conversion.config_values import is_positive_integer

KEYS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")

_FULL, _SLIDING = "full_attention", "sliding_attention"


def read_layer_windows(
    values: Mapping[str, object],
    kind: Literal["none", "all layers", "some layers"],
    num_layers: int,
    context: int,
    problems: list[str],
) -> tuple[int | None, ...]:
    """Return how many tokens each layer sees, None for all: where no text is longer than a window, there is none.

    Args:
        values: config.json over the defaults.
        kind: Which layers may have a window.
        num_layers: Layers.
        context: The longest text.
        problems: Takes what is wrong.

    Source: the `__post_init__` of transformers 5's MistralConfig, Qwen2Config, Qwen3Config and Qwen3MoeConfig.
    """
    window = values.get("sliding_window")
    is_in_use = window is not None and values.get("use_sliding_window", True)
    types = values.get("layer_types") if kind == "some layers" else None
    if isinstance(types, list) and not _are_known(types, num_layers, problems):
        return (None,) * num_layers
    if isinstance(types, list) and _SLIDING in types and not is_in_use:
        problems.append(f"layer_types has {_SLIDING}, but no sliding_window is in use: one contradicts the other")
    if kind == "none" or not is_in_use:
        return (None,) * num_layers
    if not is_positive_integer(window):
        problems.append(f"sliding_window is {window!r}, expected a positive integer or null")
        return (None,) * num_layers
    first = values.get("max_window_layers") if kind == "some layers" else 0
    first = first if isinstance(first, int) else 0
    has_window = [kind == _SLIDING for kind in types] if isinstance(types, list) else None
    size = cast(int, window) if cast(int, window) < context else None
    return tuple(
        size if (has_window[layer] if has_window is not None else layer >= first) else None
        for layer in range(num_layers)
    )


def _are_known(types: list[object], num_layers: int, problems: list[str]) -> bool:
    before = len(problems)
    if others := sorted({str(kind) for kind in types} - {_FULL, _SLIDING}):
        problems.append(f"layer_types has {', '.join(others)}, only {_FULL} and {_SLIDING} can be represented")
    elif len(types) != num_layers:
        problems.append(f"layer_types has {len(types)} entries, expected one for each of {num_layers} layers")
    return len(problems) == before


def window_keys(model: ModelConfig, defaults: Mapping[str, object]) -> dict[str, object]:
    """Return the keys that describe the windows of a model; `layer_types` only where one of them is used.

    Args:
        model: The model.
        defaults: What transformers assumes: whether a model is known to use its window.
    """
    if model.traits.windows == "none":
        return {}
    # Left out, transformers would assume a window of 4096.
    keys: dict[str, object] = {"sliding_window": model.window_size}
    if "use_sliding_window" in defaults:
        keys["use_sliding_window"] = model.window_size is not None
    if model.traits.windows == "some layers":
        has_window = [window is not None for window in model.layer_windows]
        first = has_window.index(True) if True in has_window else model.num_layers
        # Before layer_types there was only a number of layers at the beginning.
        keys["max_window_layers"] = first if all(has_window[first:]) else model.num_layers
        if model.window_size is not None:
            keys["layer_types"] = [_SLIDING if one else _FULL for one in has_window]
    return keys


def unwritable_windows(model: ModelConfig) -> list[str]:
    """List windows that the architecture of a model cannot have."""
    if model.window_size is None:
        return []
    if model.traits.windows == "none":
        return [f"model.window_size is {model.window_size}, but {model.architecture} has no windows"]
    if model.traits.windows == "all layers" and None in model.layer_windows:
        return [f"some layers have no window, but all layers of {model.architecture} have it (some: qwen2, qwen3)"]
    return []
