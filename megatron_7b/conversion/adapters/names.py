"""Names of modules, as short as PEFT's `target_modules` and `modules_to_save` can be without meaning others as well."""

from collections.abc import Collection, Iterable, Iterator

from megatron_7b.model.parameters import Parameter


def shortest_names(modules: Collection[str], others: Iterable[str]) -> list[str]:
    """Return ends of names, of whole components, that fit some modules and no others.

    Args:
        modules: Those that are meant.
        others: All modules of the model.

    Returns:
        In alphabetical order; a module for which no end will do is named in full.
    """
    foreign = {end for name in set(others).difference(modules) for end in _ends(name)}
    names = (next((end for end in _ends(module) if end not in foreign), module) for module in modules)
    return sorted(set(names))


def modules_of(rows: Iterable[Parameter]) -> set[str]:
    """Return the modules that have parameters of a model at Hugging Face, repeated ones included."""
    return {name.rpartition(".")[0] for row in rows for name in (*row.hugging_face, *row.repeated_as)}


def _ends(name: str) -> Iterator[str]:
    """Yield the last component, the last two, …, and the whole name."""
    components = name.split(".")
    for count in range(1, len(components) + 1):
        yield ".".join(components[-count:])
