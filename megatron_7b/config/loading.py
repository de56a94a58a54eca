"""Load, change, check and save the configuration of a run.

Precedence: defaults < presets and files in the order given < overrides (the command line).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_7b.config.conflicts import find_conflicts
from megatron_7b.config.optimizers import NAME, fields_of_others, why_not_of
from megatron_7b.config.problems import Problem, raise_problems
from megatron_7b.config.reading import read_settings
from megatron_7b.config.schema import RunConfig
from megatron_7b.config.sources import Setting, flatten, merge, read_source, write_yaml
from megatron_7b.files import replace_text

COMMAND_LINE = "command line"
# What a run may choose for itself when it starts from the weights of another.
_OWN_MODEL_OPTIONS = frozenset(
    {"model.transformer_impl", "model.hidden_dropout", "model.attention_dropout", "model.moe_aux_loss_coeff"}
)
_PAIR_HEAD = "model.add_binary_head"


def load_config(
    source: str | Path | Sequence[str | Path] | None,
    overrides: Mapping[str, object] | None = None,
    *,
    model_from: Path | None = None,
    world_size: int | None = None,
    require_data: bool = False,
    problems: Sequence[Problem] = (),
) -> RunConfig:
    """Build a configuration from presets, files and overrides.

    Args:
        source: A preset's name or a YAML file, several of them (later ones win), or None for the defaults.
        overrides: Values by dotted path, such as `{"training.train_steps": 10}`; texts are read as on the command line.
        model_from: Saved configuration of a run whose weights this one starts from: its model section takes the place
            of the sources' one, as weights of another shape could not be loaded.
        world_size: As for `check_config`; see below.
        require_data: As for `check_config`; see below.
        problems: What the caller found wrong with the command line, to be reported in the same message.

    Raises:
        ConfigError: A source cannot be read, or options are unknown or of the wrong type. All of these are in the one
            message, along with what `check_config` would say of the options that could be read. The latter alone does
            not fail here.
    """
    names = [source] if isinstance(source, str | Path) else list(source or ())
    layers = [read_source(name).settings for name in names]
    if model_from is not None:
        layers = [{path: item for path, item in layer.items() if not _is_shape(path)} for layer in layers]
        layers.append({path: item for path, item in read_source(model_from).settings.items() if _is_shape(path)})
    layers.append(flatten(overrides or {}, COMMAND_LINE))
    settings = merge(layers)
    config, unreadable = _read(settings)
    is_masked, pairs = config.objective_name == "masked", config.objective.sentence_pairs
    if is_masked and pairs != "none" and _PAIR_HEAD not in settings:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, add_binary_head=True))
    if problems or unreadable:
        faulty = {path for problem in unreadable for path in (problem.path, problem.meant) if path}
        conflicts = find_conflicts(config, world_size=world_size, require_data=require_data, ignore=faulty)
        raise_problems([*problems, *unreadable, *(_with_origin(conflict, settings) for conflict in conflicts)])
    return config


def override_config(config: RunConfig, overrides: Mapping[str, object]) -> RunConfig:
    """Return a copy of `config` with the values of `overrides`, given by dotted path.

    Raises:
        ConfigError: An option is unknown or of the wrong type; all of them in one message.
    """
    layers = [flatten(config_to_dict(config), "before"), flatten(overrides, COMMAND_LINE)]
    return _read_or_raise(merge(layers))


def check_config(config: RunConfig, *, world_size: int | None = None, require_data: bool = False) -> None:
    """Refuse impossible values and combinations, all of them in one message.

    Args:
        config: What to check.
        world_size: Number of ranks; None checks what holds for any number.
        require_data: Also ask for a training corpus whose files exist.

    Raises:
        ConfigError: Names each problem's dotted path, its value and what is allowed.
    """
    raise_problems(find_conflicts(config, world_size=world_size, require_data=require_data))


def config_to_dict(config: RunConfig) -> dict[str, object]:
    """Return the configuration as nested dicts of YAML scalars and lists, without the options of other optimizers."""
    tree: dict[str, Any] = {name: _plain(value) for name, value in dataclasses.asdict(config).items()}
    for path in fields_of_others(config.optimizer.name):
        del tree["optimizer"][path.partition(".")[2]]
    return tree


def config_from_dict(tree: Mapping[str, object]) -> RunConfig:
    """Return the inverse of `config_to_dict`; absent options take their defaults.

    Raises:
        ConfigError: Options are unknown or of the wrong type; all of them in one message.
    """
    return _read_or_raise(flatten(tree, "dict"))


def save_config(config: RunConfig, path: str | Path) -> None:
    """Write the effective configuration as YAML; the file appears complete or not at all, and survives a power cut."""
    replace_text(Path(path), dump_config(config))


def dump_config(config: RunConfig) -> str:
    """Return the effective configuration as YAML text that `load_config` reads back."""
    return write_yaml(config_to_dict(config), "Effective configuration; megatron-7b pretrain --config reads it.")


def _is_shape(path: str) -> bool:
    return path.startswith("model.") and path not in _OWN_MODEL_OPTIONS


def _read_or_raise(settings: Mapping[str, Setting]) -> RunConfig:
    config, problems = _read(settings)
    raise_problems(problems)
    return config


def _read(settings: Mapping[str, Setting]) -> tuple[RunConfig, list[Problem]]:
    """Build the configuration, and say which settings cannot be read or belong to an optimizer that is not chosen."""
    config, problems = read_settings(settings, RunConfig)
    name = config.optimizer.name
    if any(problem.path == NAME for problem in problems):
        return config, problems
    for path in sorted(fields_of_others(name) & settings.keys()):
        setting = settings[path]
        problems.append(Problem(path, setting.value, why_not_of(path, name), setting.origin))
    return config, problems


def _with_origin(problem: Problem, settings: Mapping[str, Setting]) -> Problem:
    written = settings.get(problem.path)
    return dataclasses.replace(problem, origin=written.origin) if written else problem


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
