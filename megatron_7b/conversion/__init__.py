"""Hugging Face ⇄ megatron-core: tables of names, typed tensor mappings, streams of weights, and a parity check.

Pure functions over full (unsharded) tensors with canonical names; reading and writing our own checkpoints is
`megatron_7b.checkpoint`'s, and the command line joins the two (`megatron-7b convert`).

Run: `megatron-7b convert to-hf --checkpoint RUN/checkpoints/latest --output FOLDER`
"""

from megatron_7b.conversion.families import FAMILIES
from megatron_7b.conversion.folder_reader import HuggingFaceFolder
from megatron_7b.conversion.hf_config import (
    SpecialTokens,
    check_exportable,
    from_hugging_face_config,
    to_generation_config,
    to_hugging_face_config,
)
from megatron_7b.conversion.parity import Parity, check_parity, compare_logits, hugging_face_logits, random_tokens
from megatron_7b.conversion.weights import (
    check_hugging_face_shapes,
    from_hugging_face,
    plan_weights,
    to_hugging_face,
)

__all__ = [
    "FAMILIES",
    "HuggingFaceFolder",
    "Parity",
    "SpecialTokens",
    "check_exportable",
    "check_hugging_face_shapes",
    "check_parity",
    "compare_logits",
    "from_hugging_face",
    "from_hugging_face_config",
    "hugging_face_logits",
    "plan_weights",
    "random_tokens",
    "to_generation_config",
    "to_hugging_face",
    "to_hugging_face_config",
]
