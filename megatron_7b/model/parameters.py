"""What a model's parameters are: one row each, from which sizes, initial values, sharding and conversion all follow.

A row describes the whole parameter, whichever rank, pipeline stage or layer spec holds how much of it. Its name is the
same at every layout and is the one in checkpoints; megatron-core's own name for it is beside it. Imports no torch.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_7b.errors import CheckpointError

type Shape = tuple[int, ...]
type InitKind = Literal["normal", "scaled_normal", "uniform", "ones", "zeros"]
type Arrangement = Literal["plain", "vocabulary", "query_key_value", "key_value", "gate_up"]

TRAINING_ONLY = "distillation."
"""How the names of parameters begin that a run needs to train and to resume, and nothing else does."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of a model.

    Attributes:
        name: Layout-independent name, as in checkpoints: `decoder.layers.3.mlp.linear_fc2.weight`. The stack (`encoder`
            or `decoder`), the layer as the configuration counts them, then megatron-core's name within a layer.
        core_name: megatron-core's name of it, with its numbers of the layers of the whole model. Initial values are a
            function of this one, so it must not change either.
        hugging_face: Names of the Hugging Face tensors that it corresponds to, in the order of its rows; where several
            are stored as one, that one; where it is stored twice, the one that counts and the other.
        shape: Of the whole parameter.
        init: `scaled_normal` is narrower by sqrt(2 × layers): projections that write into the residual stream.
            `uniform` is evenly distributed around zero.
        std: Standard deviation of the initial values; None: `model.init_method_std`.
        query_scale: Factor of those of query heads.
        tp_dim: Dimension that tensor parallelism shards; None means that every tensor rank holds the whole.
        arrangement: What its rows are. `vocabulary`: one per token, padded at the end to a multiple that the layout
            decides. `query_key_value`: for every query group its query heads, its key head and its value head.
            `key_value`: the same without queries. `gate_up`: all gate rows, then all up rows; a shard is a piece of
            each half.
        is_transposed: Hugging Face stores it the other way round, [in, out].
        is_multiplied: Every token's activations are multiplied by it, which is what FLOPs are counted from.
        share_of_tokens: How many of the tokens are, on average; of an expert's, those that use it.
        is_head: Only those of tokens that are predicted; in an encoder-decoder these are all that the decoder reads.
        is_task_head: It is of the head that `model.head` puts in the place of the output layer: fresh, unless the
            weights that a run starts from have it, and trained even if the rest is frozen.
        repeated_as: Hugging Face names under which a folder may hold the same tensor a second time.
    """

    name: str
    core_name: str
    hugging_face: tuple[str, ...]
    shape: Shape
    init: InitKind
    std: float | None = None
    query_scale: float = 1.0
    tp_dim: int | None = None
    arrangement: Arrangement = "plain"
    is_transposed: bool = False
    is_multiplied: bool = False
    share_of_tokens: float = 1.0
    is_head: bool = False
    is_task_head: bool = False
    repeated_as: tuple[str, ...] = ()

    @property
    def is_padded(self) -> bool:
        """Whether a layout may append rows that are no tokens."""
        return self.arrangement == "vocabulary"

    @property
    def expert(self) -> int | None:
        """Which expert of its layer it is of."""
        return expert_of(self.name)

    @property
    def is_layer_matrix(self) -> bool:
        """Whether it is a matrix, or several, of a layer: neither an embedding, an output layer, a norm nor a bias."""
        return len(self.shape) == 2 and self.is_multiplied and ".layers." in self.name


class ParameterTable(Mapping[str, Parameter]):
    """The parameters of one model by name, in the order of the forward pass.

    Args:
        rows: Its parameters.
    """

    def __init__(self, rows: Iterable[Parameter]) -> None:
        self._by_name = {row.name: row for row in rows}
        self._by_core_name = {row.core_name: row for row in self._by_name.values()}

    def __getitem__(self, name: str) -> Parameter:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def by_core_name(self, core_name: str) -> Parameter:
        """Return the parameter that megatron-core calls so.

        Raises:
            CheckpointError: This model has no such parameter.
        """
        try:
            return self._by_core_name[core_name]
        except KeyError:
            raise CheckpointError(f"this model has no parameter that megatron-core calls {core_name!r}") from None


def expert_of(name: str) -> int | None:
    """Return which expert of its layer a parameter is of; None: of no expert."""
    match = re.search(r"\.mlp\.experts\.(\d+)\.", name)
    return int(match.group(1)) if match else None


def expand_braces(pattern: str) -> tuple[str, ...]:
    """Return the names that a pattern stands for: `{q,k}_proj` for q_proj and k_proj; without braces itself."""
    match = re.search(r"\{([^}]*)\}", pattern)
    if match is None:
        return (pattern,)
    return tuple(pattern[: match.start()] + choice + pattern[match.end() :] for choice in match.group(1).split(","))
