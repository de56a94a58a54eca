"""Hugging Face ⇄ megatron-core: tables of names, typed tensor mappings, streams of weights, and a parity check.

`importing` and `exporting` are the two roads, each one function; `growing` makes a larger model of a smaller one.
Everything that can be checked without torch is checked before torch is imported; `parity` and `folder_writer` need it.

Run: `megatron-7b convert to-hf --checkpoint RUN/checkpoints/latest --output FOLDER`
"""

from megatron_7b.conversion.exporting import ExportOptions, export_to_hugging_face
from megatron_7b.conversion.families import FAMILIES
from megatron_7b.conversion.folder_reader import HuggingFaceFolder
from megatron_7b.conversion.growing import GrownCheckpoint, GrowOptions, grow_checkpoint
from megatron_7b.conversion.hf_config import (
    SpecialTokens,
    check_exportable,
    from_hugging_face_config,
    to_generation_config,
    to_hugging_face_config,
)
from megatron_7b.conversion.importing import ImportOptions, import_from_hugging_face
from megatron_7b.conversion.weights import (
    check_hugging_face_shapes,
    from_hugging_face,
    plan_weights,
    to_hugging_face,
)

__all__ = [
    "FAMILIES",
    "ExportOptions",
    "GrowOptions",
    "GrownCheckpoint",
    "HuggingFaceFolder",
    "ImportOptions",
    "SpecialTokens",
    "check_exportable",
    "check_hugging_face_shapes",
    "export_to_hugging_face",
    "from_hugging_face",
    "from_hugging_face_config",
    "grow_checkpoint",
    "import_from_hugging_face",
    "plan_weights",
    "to_generation_config",
    "to_hugging_face",
    "to_hugging_face_config",
]
