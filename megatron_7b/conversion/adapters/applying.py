"""A model of transformers with a PEFT folder applied to it, by PEFT itself where that is installed."""

import logging
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch

from megatron_7b.conversion.adapters.folder import PeftFolder
from megatron_7b.conversion.adapters.merging import merged_weights
from megatron_7b.conversion.reference import reported


def has_peft() -> bool:
    """Whether PEFT is installed."""
    return find_spec("peft") is not None


def with_adapter(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """Return a model of transformers with the adapter of a folder.

    Without PEFT, which this package does not require, the adapter is read as its format says and merged.

    Args:
        model: The base.
        folder: PEFT folder.

    Raises:
        ConversionError: PEFT cannot load it, or it is of a kind that cannot be converted.
    """
    if has_peft():
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it, and it misses what nobody needs
        with warnings.catch_warnings(), reported(f"PEFT cannot load the adapter in {folder}"):
            # It would say that a rank_pattern of AdaLoRA, which has other keys than LoRA's, fits no module.
            warnings.simplefilter("ignore")
            from peft import PeftModel

            adapted: torch.nn.Module = PeftModel.from_pretrained(model, folder)
            return adapted
    return with_merged_adapter(model, folder)


@torch.no_grad()
def with_merged_adapter(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """Return a model with the adapter of a folder merged into its weights, as `merging` reads it."""
    opened = PeftFolder(folder)
    parameters = dict(model.named_parameters())
    merged = merged_weights(
        parameters.items(), opened, opened.config.adapter, is_transposed=opened.config.is_transposed
    )
    for name, tensor in merged:
        parameters[name].copy_(tensor)
    return model
