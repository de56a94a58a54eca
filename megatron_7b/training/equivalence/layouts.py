"""Layouts as a user writes them, `tp=2 pp=2`, and the configurations that they stand for."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

from megatron_7b.config import RunConfig
from megatron_7b.config.schema import ParallelConfig
from megatron_7b.errors import ConfigError
from megatron_7b.parallel import build_layout

_SIZES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
}
_SWITCHES = {
    "sp": "sequence_parallel",
    "zero1": "use_distributed_optimizer",
    "overlap": "overlap_grad_reduce",
}
_RECOMPUTE = {
    "none": (),
    "selective": ("parallel.recompute_modules",),
    "full": ("parallel.recompute_method", "parallel.recompute_num_layers"),
}
"""What may be recomputed, and the options of the configuration that say how, which are refused without it."""
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
KEYS = (*_SIZES, "stages", "dp", *_SWITCHES, "recompute")
"""What a layout may say."""
_NOTHING_SAID: dict[str, object] = {f"parallel.{field.name}": field.default for field in fields(ParallelConfig)}
OPTIONS = frozenset(_NOTHING_SAID).difference(*_RECOMPUTE.values())
"""The options that a layout decides, whatever the configuration says; how it recomputes is not among them."""


@dataclass(frozen=True)
class NamedLayout:
    """One layout of a run.

    Attributes:
        name: As the user has written it.
        config: The run at this layout, checked.
        world_size: Its ranks.
    """

    name: str
    config: RunConfig
    world_size: int


def read_layouts(texts: Sequence[str], load: Callable[[Mapping[str, object], int], RunConfig]) -> list[NamedLayout]:
    """Read layouts and check that the run fits each of them.

    Args:
        texts: Such as `tp=2 pp=2 sp zero1`; what a layout does not say is one, or off.
        load: Returns the checked configuration of the run, given values by dotted path and the number of ranks.

    Returns:
        The layouts, the one with the fewest ranks first: it is what the others are compared with.

    Raises:
        ConfigError: A layout cannot be read, or the run does not fit it; all of them in one message.
    """
    if len(texts) < 2:
        raise ConfigError(
            f"there are {len(texts)} layouts, expected at least two to compare",
            hint='--layout "tp=2 pp=2" --layout "tp=1"',
        )
    found, problems = [], []
    for text in texts:
        try:
            values, replicas = _parse(text)
            found.append(_layout(text, values, replicas, load))
        except ConfigError as error:
            problems.append(f"layout {text!r}: {error}")
    if problems:
        raise ConfigError("\n".join(problems))
    return sorted(found, key=lambda layout: layout.world_size)


def _layout(
    text: str, values: dict[str, object], replicas: int, load: Callable[[Mapping[str, object], int], RunConfig]
) -> NamedLayout:
    model_size = 1
    for key in ("tp", "pp", "cp"):
        model_size *= int(str(values[f"parallel.{_SIZES[key]}"]))
    world_size = model_size * replicas
    config = load(values, world_size)
    build_layout(config.parallel, world_size=world_size, rank=0)
    return NamedLayout(text, config, world_size)


def _parse(text: str) -> tuple[dict[str, object], int]:
    """Return the values of the configuration that a layout stands for, and its number of replicas."""
    said: dict[str, str] = {}
    for word in text.replace(",", " ").split():
        key, _, value = word.lower().partition("=")
        if key not in KEYS:
            raise ConfigError(f"{key!r} is unknown, expected {', '.join(KEYS)}")
        if key in said:
            raise ConfigError(f"{key} is there twice")
        said[key] = value
    if not said:
        raise ConfigError("it is empty", hint='one rank is "tp=1"')
    values = dict(_NOTHING_SAID)
    for key, value in said.items():
        if key in _SIZES:
            values[f"parallel.{_SIZES[key]}"] = _size(key, value)
        elif key in _SWITCHES:
            values[f"parallel.{_SWITCHES[key]}"] = _switch(key, value)
        elif key == "stages":
            values["parallel.pipeline_model_parallel_layout"] = tuple(_size(key, part) for part in value.split("+"))
        elif key == "recompute":
            if value not in _RECOMPUTE:
                raise ConfigError(f"recompute is {value!r}, expected one of {', '.join(_RECOMPUTE)}")
            values["parallel.recompute_granularity"] = value
            for path in _RECOMPUTE[value]:
                del values[path]
    return values, _size("dp", said.get("dp", "1"))


def _size(key: str, value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        example = "stages=3+1" if key == "stages" else f"{key}=2"
        raise ConfigError(f"{key} is {value!r}, expected a number of at least 1, such as {example}")
    return int(value)


def _switch(key: str, value: str) -> bool:
    if value not in ("", *_TRUE, *_FALSE):
        raise ConfigError(f"{key} is {value!r}, expected on or off")
    return value not in _FALSE
