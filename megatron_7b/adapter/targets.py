"""Which linear layers an adapter is put beside, by the names that they have at Hugging Face. Imports no torch."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from megatron_7b.config.adapters import AdapterConfig
from megatron_7b.config.schema import ModelConfig
from megatron_7b.errors import ConfigError
from megatron_7b.model.parameters import Parameter, ParameterTable

ALL_LINEAR = "all-linear"
_WEIGHT = ".weight"


@dataclass(frozen=True, kw_only=True)
class Projection:
    """A linear layer as Hugging Face has it: all of one of ours, or one of several that ours computes at once.

    Attributes:
        hugging_face: Its name there, `model.layers.3.self_attn.q_proj`.
        weight: The row of our weight.
        slot: Which of the parts that follow one another in every group of the weight's rows it is.
        group_rows: How many rows it has in each group.
        num_groups: How many groups there are.
    """

    hugging_face: str
    weight: Parameter
    slot: int
    group_rows: int
    num_groups: int

    @property
    def name(self) -> str:
        """The last component of its name: `q_proj`."""
        return self.hugging_face.rpartition(".")[2]

    @property
    def num_rows(self) -> int:
        """Outputs of the projection."""
        return self.group_rows * self.num_groups

    @property
    def is_fused(self) -> bool:
        """Whether it is several projections at Hugging Face too (GPT-2's c_attn)."""
        return len(self.weight.hugging_face) == 1 and self.weight.arrangement != "plain"


def projections(weight: Parameter, model: ModelConfig) -> list[Projection]:
    """Return what Hugging Face has for the weight of one of our linear layers, in the order of its rows."""
    names = [name.removesuffix(_WEIGHT) for name in weight.hugging_face]
    sizes, num_groups = [weight.shape[0]], 1
    if len(names) > 1:
        sizes, num_groups = _group(weight, model)
    return [
        Projection(hugging_face=name, weight=weight, slot=slot, group_rows=rows, num_groups=num_groups)
        for slot, (name, rows) in enumerate(zip(names, sizes, strict=True))
    ]


def _group(weight: Parameter, model: ModelConfig) -> tuple[list[int], int]:
    """Return the rows of each projection in one group of a weight's rows, and the number of groups."""
    width = model.head_width
    match weight.arrangement:
        case "query_key_value":
            return [model.num_attention_heads // model.query_groups * width, width, width], model.query_groups
        case "key_value":
            return [width, width], weight.shape[0] // (2 * width)
        case "gate_up":
            return [weight.shape[0] // 2] * 2, 1
        case other:
            raise ValueError(f"{weight.name} is stored as several tensors, and its rows are arranged as {other!r}")


def targeted(
    table: ParameterTable,
    model: ModelConfig,
    wanted: Sequence[str],
    *,
    fits: Callable[[Parameter], bool] = lambda _: True,
) -> list[Projection]:
    """Return the projections that a choice of names means.

    Args:
        table: A model's parameters.
        model: Its shape.
        wanted: `all-linear`, or ends of names at Hugging Face, of whole components; nothing means all.
        fits: Which weights can be meant.

    Raises:
        ConfigError: A name fits none of the model's linear layers.
    """
    there = [one for row in table.values() if row.is_layer_matrix and fits(row) for one in projections(row, model)]
    if not wanted or tuple(wanted) == (ALL_LINEAR,):
        return there
    unknown = [name for name in wanted if not any(_means(name, one.hugging_face) for one in there)]
    if unknown:
        raise ConfigError(
            f"adapter.target_modules has {_quoted(unknown)}, which no linear layer of this {model.architecture} model "
            f"that can be adapted so is called; there are {', '.join(dict.fromkeys(one.name for one in there))}",
            hint=f"name some of these, or all-linear; {_hint_for_others(unknown, table)}",
        )
    return [one for one in there if any(_means(name, one.hugging_face) for name in wanted)]


def check_modules_to_save(table: ParameterTable, adapter: AdapterConfig) -> None:
    """Refuse names in `adapter.modules_to_save` that fit no module of the model.

    Raises:
        ConfigError: There are such names.
    """
    modules = dict.fromkeys(module for row in table.values() for module in _modules(row))
    unknown = [name for name in adapter.modules_to_save if not any(_means(name, module) for module in modules)]
    if unknown:
        raise ConfigError(
            f"adapter.modules_to_save has {_quoted(unknown)}, which no module of the model is called",
            hint=f"there are {', '.join(dict.fromkeys(module.rpartition('.')[2] for module in modules))}",
        )


def is_trained_as_a_whole(row: Parameter, adapter: AdapterConfig) -> bool:
    """Return whether `adapter.modules_to_save` names the module of one of the model's own parameters."""
    return any(_means(name, module) for name in adapter.modules_to_save for module in _modules(row))


def _modules(row: Parameter) -> Iterator[str]:
    """Yield the modules that have a parameter at Hugging Face."""
    for name in (*row.hugging_face, *row.repeated_as):
        yield name.rpartition(".")[0]


def _means(wanted: str, module: str) -> bool:
    return module == wanted or module.endswith(f".{wanted}")


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _hint_for_others(unknown: Sequence[str], table: ParameterTable) -> str:
    whole = [name for name in unknown if any(_means(name, m) for row in table.values() for m in _modules(row))]
    if whole:
        return f"{_quoted(whole)} can be trained as a whole: --adapter.modules-to-save {' '.join(whole)}"
    return "names are Hugging Face's"
