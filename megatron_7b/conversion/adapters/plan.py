"""Which tensors an adapter has in a checkpoint of ours and in a PEFT folder. Needs no torch."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_7b.adapter import build_adapter
from megatron_7b.config.schema import RunConfig
from megatron_7b.conversion.adapters.names import modules_of, shortest_names
from megatron_7b.conversion.mappings import build_mapping
from megatron_7b.conversion.weights import PlannedTensor
from megatron_7b.errors import ConversionError
from megatron_7b.model.kinds import parameter_table
from megatron_7b.model.parameters import ParameterTable, Shape

if TYPE_CHECKING:
    from torch import Tensor

_MOST_LISTED = 8


@dataclass(frozen=True)
class AdapterPlan:
    """The tensors of an adapter.

    Attributes:
        added: What the adapter adds to the model.
        whole: Parameters of the model that are trained as a whole.
        table: All parameters of the model.
    """

    added: tuple[PlannedTensor, ...]
    whole: tuple[PlannedTensor, ...]
    table: ParameterTable

    @property
    def tensors(self) -> tuple[PlannedTensor, ...]:
        """All of them."""
        return (*self.added, *self.whole)

    @property
    def target_modules(self) -> list[str]:
        """What PEFT calls the modules that have an adapter."""
        return shortest_names(adapted_modules(name for entry in self.added for name in entry.hugging_face), self._all)

    @property
    def modules_to_save(self) -> list[str]:
        """What PEFT calls the modules that are trained as a whole: of a tied embedding, the output layer too."""
        return shortest_names(modules_of(entry.parameter for entry in self.whole), self._all)

    @property
    def is_transposed(self) -> bool:
        """Whether the weights that have an adapter are stored as [in, out]."""
        weights = [row for row in self.table.values() if row.is_layer_matrix]
        return any(row.is_transposed for row in weights)

    def check_modules_are_whole(self) -> None:
        """Refuse modules of which only some parameters are trained, as PEFT saves whole ones.

        Raises:
            ConversionError: There is one.
        """
        trained = {entry.canonical for entry in self.whole}
        modules = modules_of(entry.parameter for entry in self.whole)
        for row in self.table.values():
            if row.name not in trained and (shared := sorted(modules_of([row]) & modules)):
                raise ConversionError(
                    f"{shared[0]} was trained without {row.hugging_face[0]}, and PEFT saves all of a module",
                    hint=f"--merge writes the whole model; or train it with --adapter.modules-to-save {shared[0]}",
                )

    @property
    def _all(self) -> set[str]:
        return modules_of(self.table.values())


def plan_adapter(config: RunConfig) -> AdapterPlan:
    """Return the tensors of a configuration's adapter.

    Args:
        config: With an adapter; `model.vocab_size` is set.

    Raises:
        ConfigError: The model has no layer or module of a name that is given.
    """
    adapter, vocab_size = build_adapter(config), config.model.vocab_size
    assert adapter is not None
    assert vocab_size is not None
    table = parameter_table(config.model, vocab_size)
    own, trained = adapter.own_names(table), adapter.trained_names(table)
    rows = adapter.extended(table)
    entries = [PlannedTensor(rows[name], build_mapping(rows[name], config.model)) for name in rows if name in trained]
    return AdapterPlan(
        added=tuple(entry for entry in entries if entry.canonical in own),
        whole=tuple(entry for entry in entries if entry.canonical not in own),
        table=table,
    )


def adapted_modules(names: "Iterator[str] | Collection[str]") -> set[str]:
    """Return the modules that have an adapter, given the names of its tensors at Hugging Face."""
    return {name.partition(".lora_")[0] for name in names if ".lora_" in name}


def to_peft(plan: AdapterPlan, canonical: "Mapping[str, Tensor]") -> "Iterator[tuple[str, Tensor]]":
    """Rename and rearrange the tensors of an adapter.

    Args:
        plan: Which they are.
        canonical: Whole tensors by canonical name.

    Yields:
        Name without PEFT's prefix, and tensor.

    Raises:
        ConversionError: Tensors are missing, unexpected or misshapen.
    """
    _check_names(canonical, {entry.canonical for entry in plan.tensors}, "the checkpoint")
    for entry in plan.tensors:
        parts = entry.mapping.to_hugging_face(canonical[entry.canonical])
        yield from zip(entry.hugging_face, parts, strict=True)
        for name in entry.parameter.repeated_as:  # PEFT trains a copy of each module, whether they are tied or not
            yield name, parts[0]


def pruned(tensors: "Mapping[str, Tensor]") -> "tuple[dict[str, Tensor], dict[str, list[bool]]]":
    """Leave out the ranks of AdaLoRA whose singular value is zero, which change nothing.

    Args:
        tensors: By name without PEFT's prefix.

    Returns:
        The tensors, and which ranks are left by the name of each lora_E; nothing is left out of an adapter whose every
        value is zero because it was never trained.
    """
    kept = {name: tensor.flatten() != 0 for name, tensor in tensors.items() if name.endswith(".lora_E")}
    if not any(bool(left.any()) for left in kept.values()):
        return dict(tensors), {}
    found = {}
    for name, tensor in tensors.items():
        module, separator, end = name.partition(".lora_")
        left = kept.get(f"{module}.lora_E") if separator else None
        found[name] = tensor if left is None else tensor[:, left] if end.startswith("B") else tensor[left]
    return found, {name: left.tolist() for name, left in kept.items()}


def from_peft(plan: AdapterPlan, tensors: "Mapping[str, Tensor]") -> "Iterator[tuple[str, Tensor]]":
    """Rename and rearrange the tensors of a PEFT folder.

    Args:
        plan: Which they are.
        tensors: By name without PEFT's prefix.

    Yields:
        Canonical name and whole tensor.

    Raises:
        ConversionError: Two names of what is one tensor here have different values.
    """
    for entry in plan.tensors:
        parts = [tensors[name] for name in entry.hugging_face]
        for name in entry.parameter.repeated_as:
            if name in tensors and not tensors[name].equal(parts[0]):
                raise ConversionError(
                    f"{name} differs from {entry.hugging_face[0]}, to which the base ties it",
                    hint="they were trained apart; merge the adapter with PEFT, and convert the whole model",
                )
        yield entry.canonical, entry.mapping.from_hugging_face(*parts)


def check_peft_shapes(shapes: Mapping[str, Shape], plan: AdapterPlan, *, ties_copies: bool) -> None:
    """Compare the tensors of a PEFT folder with what its configuration promises.

    Args:
        shapes: Shape by name without PEFT's prefix.
        plan: Of the configuration.
        ties_copies: What is tied was trained as one, even if only one of the names is there.

    Raises:
        ConversionError: Tensors are missing, unexpected or misshapen; all are named.
    """
    expected = {
        name: shape
        for entry in plan.tensors
        for name, shape in zip(entry.hugging_face, entry.mapping.hugging_face_shapes, strict=True)
    }
    repeated = {name for entry in plan.whole for name in entry.parameter.repeated_as}
    if apart := sorted(repeated - shapes.keys()) if not ties_copies else []:
        raise ConversionError(
            f"{apart[0]} is tied to a module of modules_to_save in the base, and was not trained with it",
            hint="here they are one; train with both names in modules_to_save, or with ensure_weight_tying",
        )
    _check_names(set(shapes) - (repeated - expected.keys()), set(expected), "the PEFT folder")
    wrong = [
        f"{name} is {list(shapes[name])}, its configuration and the base make it {list(shape)}"
        for name, shape in expected.items()
        if shapes[name] != shape
    ]
    if wrong:
        raise ConversionError("tensors do not fit adapter_config.json and the base:\n  " + "\n  ".join(_cut(wrong)))


def _check_names(found: Collection[str], expected: Collection[str], where: str) -> None:
    missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    problems = [
        f"{len(names)} {what}:\n  " + "\n  ".join(_cut(names))
        for what, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if problems:
        raise ConversionError(f"the tensors of {where} do not fit its adapter; " + "\n".join(problems))


def _cut(lines: list[str]) -> list[str]:
    more = len(lines) - _MOST_LISTED
    return lines if more <= 0 else [*lines[:_MOST_LISTED], f"and {more} more"]
