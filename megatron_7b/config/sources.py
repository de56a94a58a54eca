"""Where settings come from: YAML presets and files, which may extend one another, and the command line.

A source is flattened into settings by dotted path. Later sources replace earlier ones path by path, and every setting
remembers where it was written, so that a message can name the file to open.
"""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_7b.config.adapters import METHOD, fields_of_other_methods
from megatron_7b.config.optimizers import NAME, fields_of_others
from megatron_7b.config.options import sections
from megatron_7b.config.problems import nearest
from megatron_7b.config.schema import RunConfig
from megatron_7b.errors import ConfigError

PRESETS_FOLDER = Path(__file__).parent / "presets"
METADATA_KEYS = ("extends", "description", "intended_world_size")


@dataclass(frozen=True)
class Setting:
    """One value as it was written, before its type is known to be right."""

    value: object
    origin: str


@dataclass(frozen=True)
class Source:
    """A YAML file with everything that it extends folded in."""

    settings: dict[str, Setting]
    description: str
    intended_world_size: int | None
    """Ranks that a layout preset was made for; not inherited."""


def preset_names() -> list[str]:
    """Return the names of the shipped presets, sorted; `_`-files only serve to be extended."""
    return sorted(path.stem for path in PRESETS_FOLDER.glob("[!_]*.yaml"))


def read_source(source: str | Path, root: type = RunConfig) -> Source:
    """Read a preset by name, or a YAML file by path, with everything that it extends.

    Args:
        source: Name or path.
        root: The dataclass whose sections the file fills; presets are of runs.

    Raises:
        ConfigError: There is no such preset or file, it is not a YAML mapping, or it extends itself.
    """
    return _read(_locate(str(source), relative_to=Path()), root, trail=())


def merge(layers: Iterable[Mapping[str, Setting]]) -> dict[str, Setting]:
    """Fold layers of settings into one, the later ones winning path by path.

    A nested group that is set as a whole (`model.rope_scaling: none`) and settings inside of it replace each other. A
    layer that names an optimizer, or a method of adapters, replaces the options that belong to others.
    """
    merged: dict[str, Setting] = {}
    for layer in layers:
        for name, of_others in ((NAME, fields_of_others), (METHOD, fields_of_other_methods)):
            if name in layer:
                for path in of_others(layer[name].value) & merged.keys():
                    del merged[path]
        for path, setting in layer.items():
            for other in [other for other in merged if _contains(other, path) or _contains(path, other)]:
                del merged[other]
            merged[path] = setting
    return merged


def flatten(tree: Mapping[str, object], origin: str, prefix: str = "", *, root: type = RunConfig) -> dict[str, Setting]:
    """Return the settings by dotted path from a nested mapping of sections; dotted keys are taken as they are.

    A section may be there with all its fields commented out: it sets nothing.
    """
    flat: dict[str, Setting] = {}
    known = sections(root)
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, origin, f"{path}.", root=root))
        elif value is not None or path not in known:
            flat[path] = Setting(value, origin)
    return flat


def _contains(group: str, path: str) -> bool:
    return path.startswith(f"{group}.")


def _locate(name: str, *, relative_to: Path) -> Path:
    """Resolve a preset name or a path; a name with a suffix or a folder is always a path."""
    if name in preset_names() or (relative_to == PRESETS_FOLDER and name.isidentifier()):
        return PRESETS_FOLDER / f"{name}.yaml"
    path = relative_to / name
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") or "/" in name:
        raise ConfigError(f"no configuration file {path}", hint="give the path of a YAML file, or a preset's name")
    if name == "auto":
        raise ConfigError(
            "--config auto chooses a layout for this machine, which only `megatron-7b pretrain` and `finetune` do",
            hint="`megatron-7b plan` finds layouts for this machine (--gpu cpu) and for others",
        )
    guess = nearest(name, preset_names())
    raise ConfigError(
        f"unknown preset {name!r}" + (f"; did you mean {guess}?" if guess else ""),
        hint=f"presets are {', '.join(preset_names())}; anything else is the path of a YAML file",
    )


def _read(path: Path, root: type, trail: tuple[Path, ...]) -> Source:
    if path.resolve() in trail:
        raise ConfigError(f"{path} extends itself: {' -> '.join(str(step) for step in (*trail, path))}")
    tree = _load_yaml(path)
    extends = tree.pop("extends", None) or []
    if not isinstance(extends, str | list) or not all(isinstance(name, str) for name in extends):
        raise ConfigError(f"{path}: extends = {extends!r}: expected a preset's name, a path, or a list of them")
    names = [extends] if isinstance(extends, str) else extends
    bases = [_read(_locate(name, relative_to=path.parent), root, (*trail, path.resolve())) for name in names]
    description = str(tree.pop("description", ""))
    world_size = tree.pop("intended_world_size", None)
    if world_size is not None and (not isinstance(world_size, int) or world_size < 1):
        raise ConfigError(f"{path}: intended_world_size = {world_size!r}: expected a positive number of ranks")
    origin = f"preset {path.stem}" if path.parent == PRESETS_FOLDER else str(path)
    settings = merge([*(base.settings for base in bases), flatten(tree, origin, root=root)])
    return Source(settings, description, world_size)


def _load_yaml(path: Path) -> dict[str, object]:
    try:
        with path.open(encoding="utf-8") as file:  # whose name is in what yaml says of a mistake
            tree = yaml.load(file, Loader=_StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path} holds a {type(tree).__name__}, not sections",
            hint="write it as in:\ntraining:\n  train_steps: 100",
        )
    return {str(key): value for key, value in tree.items()}


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, except that a key given twice is an error instead of the last one winning."""


def _construct_unique_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Hashable, object]:
    seen: set[object] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_unique_mapping)


def write_yaml(tree: Mapping[str, object], header: str) -> str:
    """Return a nested mapping as YAML text in its own order, below a comment line."""
    return f"# {header}\n" + yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True)
