"""What a conversion tells while it works, and how number formats are named there. Needs no torch."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from megatron_7b.config.schema import ModelConfig
from megatron_7b.model.sizes import count_parameters

if TYPE_CHECKING:
    import torch

type Report = Callable[[str, str], None]
"""Takes a topic of one word ("reading", "parity", "wrote", "warning") and a sentence."""

DtypeName = Literal["auto", "bf16", "fp32"]


def tell_nobody(_topic: str, _message: str) -> None:
    """Be a `Report` that shows nothing."""


def describe_model(model: ModelConfig, vocab_size: int) -> str:
    """Name a model in one line."""
    num_parameters = count_parameters(model, vocab_size=vocab_size)
    return f"{model.architecture}, {num_parameters:,} parameters, vocabulary {vocab_size:,}"


def describe_output(num_bytes: int, dtype: str, seconds: float) -> str:
    """Say what was written."""
    return f"weights of {num_bytes / 1e9:.2f} GB in {dtype.upper()}, {seconds:.1f} s"


def torch_dtype(name: str) -> "torch.dtype":
    """Return the number format of a name such as bf16 or bfloat16; everything but BF16 is held by FP32."""
    import torch

    return torch.bfloat16 if name in ("bf16", "bfloat16") else torch.float32
