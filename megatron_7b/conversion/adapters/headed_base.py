"""The weights that an adapter was trained beside, with the head that it was trained with."""

from collections import ChainMap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

from megatron_7b.checkpoint import read_config
from megatron_7b.config.schema import ModelConfig
from megatron_7b.model.starting_head import find_head_difference

if TYPE_CHECKING:
    from torch import Tensor


def base_with_head(base: Path, checkpoint: Path, model: ModelConfig) -> "Mapping[str, Tensor]":
    """Return the tensors of a base by canonical name; what only its own head has is left out.

    Args:
        base: A complete checkpoint of a whole model.
        checkpoint: That of the adapter, which holds the head.
        model: Shape of the adapted model.
    """
    from megatron_7b.checkpoint.weights import CheckpointWeights

    of_base, of_adapter = CheckpointWeights(base), CheckpointWeights(checkpoint)
    if not model.has_head:
        return of_base
    difference = find_head_difference(model, read_config(base).model)
    left = difference.left | difference.fresh
    heads = {name for name in of_adapter if name in difference.fresh | difference.may_lack or "task_head" in name}
    kept = _Some(of_base, frozenset(of_base) - left)
    own = _Some(of_adapter, frozenset(heads))
    return ChainMap(cast("dict[str, Tensor]", own), cast("dict[str, Tensor]", kept))


class _Some(Mapping[str, "Tensor"]):
    """Some tensors of a checkpoint, read when they are asked for."""

    def __init__(self, weights: "Mapping[str, Tensor]", names: frozenset[str]) -> None:
        self._weights, self._names = weights, names

    def __getitem__(self, name: str) -> "Tensor":
        if name not in self._names:
            raise KeyError(name)
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._weights if name in self._names)

    def __len__(self) -> int:
        return len(self._names)
