"""This process's device, and the memory that it has used: what reported figures are compared with."""

import torch

from megatron_7b.runtime.machine.device import DeviceType
from megatron_7b.runtime.machine.device_facts import processor
from megatron_7b.runtime.machine.host_memory import peak_own_bytes


def device_name(device_type: DeviceType) -> str:
    """Return the name of this process's device: torch's name of the GPU, or the processor's model."""
    if device_type == "cuda":
        return torch.cuda.get_device_name()
    return processor()


def device_memory_bytes(device_type: DeviceType) -> int | None:
    """Return how much of this process's GPU is taken at the moment, by whatever; None on a CPU.

    Beside what `peak_memory_bytes` counts, that is what torch has reserved and does not use, NCCL's connections, the
    libraries' work spaces and code, CUDA graphs, and other processes.
    """
    if device_type == "cpu":
        return None
    free, total = torch.cuda.mem_get_info()
    return total - free


def peak_memory_bytes(device_type: DeviceType) -> int:
    """Return the most memory that this process has held: device memory in torch's allocator, or its own on the host.

    On the CPU this is the high-water mark of this program's own address space, without pages of files; `getrusage`
    would also count what the launcher held before it started the program.
    """
    if device_type == "cuda":
        return torch.cuda.max_memory_allocated()
    if peak := peak_own_bytes():
        return peak
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
