"""Which device this process computes on: the only place that asks."""

import functools
import os
from typing import Literal

import torch

from megatron_7b.errors import ConfigError
from megatron_7b.runtime.machine.device_facts import multiplies_bf16

DeviceType = Literal["cpu", "cuda"]


def resolve_device(requested: Literal["auto", "cpu", "cuda"]) -> DeviceType:
    """Return the device type to use.

    Raises:
        ConfigError: `cuda` was asked for and torch sees no GPU.
    """
    available = torch.cuda.is_available()
    if requested == "cuda" and not available:
        raise ConfigError(
            "runtime.device is 'cuda', but torch sees no GPU",
            hint="set runtime.device to 'auto', or see what `megatron-7b doctor` says about the driver",
        )
    if requested == "auto":
        return "cuda" if available else "cpu"
    return requested


def local_rank() -> int:
    """Return this process's index among those of its machine (from the launcher, else 0)."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))


def torch_device(device_type: DeviceType) -> torch.device:
    """Return the device of this process: the GPU of its local rank, or the CPU."""
    return torch.device("cuda", local_rank()) if device_type == "cuda" else torch.device("cpu")


@functools.cache
def has_native_bf16(device_type: DeviceType) -> bool:
    """Return whether BF16 matrix products run in hardware: Ampere or later; AVX512-BF16 or AMX on a CPU.

    Elsewhere they are emulated and slower than FP32 (measured on an AVX512 machine without BF16: 54 against
    146 GFLOP/s).
    """
    if device_type == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    return multiplies_bf16()
