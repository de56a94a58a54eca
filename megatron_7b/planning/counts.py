"""The parameters of a model, equal ones counted together: a plan can look at thousands of layouts in a second."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_7b.config.schema import ModelConfig
from megatron_7b.model.adapter import Adapter
from megatron_7b.model.kinds import parameter_table
from megatron_7b.model.parameters import Parameter, Shape
from megatron_7b.model.sizes import padded_vocab_size
from megatron_7b.parallel import ParallelLayout

_LAYER = re.compile(r"^\w+\.layers\.\d+\.")

Part = Literal["first", "layers", "last"]


@dataclass(frozen=True)
class Group:
    """Parameters that are alike.

    Attributes:
        part: Where they are: before all layers, in each of them, or after all.
        shape: Of each, without vocabulary padding.
        tp_dim: Dimension that tensor ranks divide.
        is_vocabulary: Its rows are tokens, and are padded.
        is_expert: They are of experts, which expert-parallel ranks divide.
        share_of_tokens: How many of the tokens each is multiplied with.
        is_multiplied: Whether tokens are multiplied with it at all.
        is_head: Only predicted tokens are multiplied with it: of the output layer, or of a decoder beside an encoder.
        is_mlp: It is of an MLP.
        is_layer_matrix: It is a matrix of a layer.
        is_trained: It has gradients.
    """

    part: Part
    shape: Shape
    tp_dim: int | None
    is_vocabulary: bool
    is_expert: bool
    share_of_tokens: float
    is_multiplied: bool
    is_head: bool
    is_mlp: bool
    is_layer_matrix: bool
    is_trained: bool


class ModelCounts:
    """All parameters of a model as groups of equal ones.

    Args:
        model: Its shape, with the vocabulary's true size.
        adapter: Added to the model; what it does not train has no gradients.
    """

    def __init__(self, model: ModelConfig, adapter: Adapter | None = None) -> None:
        self.model = model
        self.num_layers = model.num_layers + (model.decoder_layers if model.traits.kind == "encoder_decoder" else 0)
        table = parameter_table(model, model.vocab_size or 1)
        trained = None if adapter is None else adapter.trained_names(table)
        rows = (table if adapter is None else adapter.extended(table)).values()
        self.groups: Counter[Group] = Counter()
        """How many there are of each, in the whole model."""
        has_begun = False
        for row in rows:
            is_layer = _LAYER.match(row.name) is not None
            has_begun |= is_layer
            part: Part = "layers" if is_layer else "last" if has_begun else "first"
            self.groups[_group(row, part, is_trained=trained is None or row.name in trained)] += 1
        self._elements: dict[object, int] = {}

    def multiplied(self) -> Iterator[tuple[Group, int]]:
        """Yield the groups that tokens are multiplied with, and how many there are in the whole model."""
        return ((group, number) for group, number in self.groups.items() if group.is_multiplied)

    def elements(self, layout: ParallelLayout, name: str, counts: Callable[[Group], bool]) -> int:
        """Return how many elements of some groups a rank holds.

        Args:
            layout: Position of the rank.
            name: Of what is counted, under which the result is kept.
            counts: Which groups are.
        """
        stage = (layout.is_first_stage, layout.is_last_stage)
        key = (name, layout.tp_size, self._layers(layout), layout.ep_size, stage)
        if key not in self._elements:
            self._elements[key] = sum(
                self.size(group, layout.tp_size) * self._held(group, number, layout)
                for group, number in self.groups.items()
                if counts(group)
            )
        return self._elements[key]

    def size(self, group: Group, tp_size: int) -> int:
        """Return the elements of one parameter of a group that a tensor rank holds."""
        rows, *others = group.shape
        if group.is_vocabulary:
            rows = padded_vocab_size(rows, self.model.make_vocab_size_divisible_by, tp_size)
        return rows * math.prod(others) // (1 if group.tp_dim is None else tp_size)

    def _layers(self, layout: ParallelLayout) -> int:
        return layout.layers_of(self.model.num_layers, layout.pp_rank)

    def _held(self, group: Group, number: int, layout: ParallelLayout) -> int:
        if group.part == "layers":
            here = number * self._layers(layout) // self.model.num_layers
            return here // (layout.ep_size if group.is_expert else 1)
        # The last stage has a copy of what it shares with the first.
        is_shared = group.part == "first" and group.is_multiplied
        is_here = layout.is_first_stage if group.part == "first" else layout.is_last_stage
        return number * (is_here or (is_shared and layout.is_last_stage))


def _group(row: Parameter, part: Part, *, is_trained: bool) -> Group:
    return Group(
        part=part,
        shape=row.shape,
        tp_dim=row.tp_dim,
        is_vocabulary=row.is_padded,
        is_expert=row.expert is not None,
        share_of_tokens=row.share_of_tokens,
        is_multiplied=row.is_multiplied,
        is_head=row.is_head,
        is_mlp=".mlp." in row.name,
        is_layer_matrix=row.is_layer_matrix,
        is_trained=is_trained,
    )
