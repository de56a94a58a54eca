"""Linear layers from the hidden states of a student to the width of its teacher's, for as long as it learns from it.

They are parameters of the run: trained, and in its checkpoints so that it resumes, under names that begin with
`TRAINING_ONLY`, which whatever else reads a checkpoint leaves out.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from megatron_7b.model.adapter import Adapter
from megatron_7b.model.layer_pairs import EMBEDDING, LayerPair
from megatron_7b.model.parameters import TRAINING_ONLY, Parameter, ParameterTable

if TYPE_CHECKING:
    import torch

    from megatron_7b.model.kinds.chunk import ModelChunk

_MODULE = TRAINING_ONLY.removesuffix(".")


def _module_name(place: int) -> str:
    return "embedding" if place == EMBEDDING else f"layers.{place}"


def projections(
    pairs: Sequence[LayerPair], width: int, width_of_teacher: int, *, core_layers_per_layer: int
) -> Adapter:
    """Return a projection per place that is compared, as what is added to a model that is trained as a whole.

    Args:
        pairs: The places.
        width: Of the student's hidden states.
        width_of_teacher: Of the teacher's.
        core_layers_per_layer: That of the kind of model.
    """

    def rows(_table: ParameterTable) -> Iterator[Parameter]:
        for pair in pairs:
            name = f"{TRAINING_ONLY}{_module_name(pair.student)}.weight"
            shape = width_of_teacher, width
            yield Parameter(name=name, core_name=name, hugging_face=(), shape=shape, init="normal", std=width**-0.5)

    def attach(chunk: "ModelChunk", _table: ParameterTable) -> None:
        import torch

        held = {layer.layer_number for layer in chunk.stack.layers}
        if hasattr(chunk, "embedding"):
            held.add(EMBEDDING)
        parts: torch.nn.ModuleDict = torch.nn.ModuleDict({"layers": torch.nn.ModuleDict()})
        for pair in pairs:
            if pair.student * core_layers_per_layer not in held:
                continue
            layer = torch.nn.Linear(width, width_of_teacher, bias=False, dtype=chunk.config.params_dtype)
            # Where tensor ranks have their own tokens each, their gradients are summed.
            layer.weight.sequence_parallel = chunk.config.sequence_parallel  # type: ignore[attr-defined]
            if pair.student == EMBEDDING:
                parts["embedding"] = layer
            else:
                parts["layers"][str(pair.student)] = layer  # type: ignore[operator]
        chunk.add_module(_MODULE, parts)

    return Adapter(
        kernels=lambda kernels: kernels, rows=rows, trains_too=lambda _row: True, attach=attach, keeps_training=True
    )


def projection_of(chunk: "ModelChunk", place: int) -> "torch.nn.Module | None":
    """Return the projection of a place; None where the widths are equal."""
    return chunk.get_submodule(f"{_MODULE}.{_module_name(place)}") if hasattr(chunk, _MODULE) else None
