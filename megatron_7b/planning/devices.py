"""Devices to plan for: memory, rates and links of each, and how much of its rates training reaches.

Source of the rates: NVIDIA's data sheets. Of the memory: what torch reports, a few percent below the round number. Of
the efficiencies: fitted to measured and published runs; docs/planning.md says which, and how large the errors are.
"""

import re
from dataclasses import dataclass, replace
from typing import Literal

from megatron_7b.config.problems import nearest
from megatron_7b.errors import ConfigError
from megatron_7b.runtime.machine.device_facts import available_cores, bf16_instructions
from megatron_7b.runtime.machine.host_memory import available_memory
from megatron_7b.runtime.machine.peak_rates import peak_tflops


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """How much of a device's rates the kernels of a training step reach.

    Attributes:
        matrix_products: Of large matrix products in BF16 or FP32, as a share of the format's rate.
        fp8_products: The same in FP8, without the casts.
        attention: Of attention over long sequences, forward and backward together.
        memory: Of the memory's bandwidth, in element-wise kernels, the loss and the optimizer.
        link: Of the links within a node.
        network: Of the network between nodes.
    """

    matrix_products: float
    fp8_products: float
    attention: float
    memory: float
    link: float
    network: float


@dataclass(frozen=True, kw_only=True)
class Device:
    """One rank's device, with its links.

    Attributes:
        name: As `--gpu` takes it.
        title: In full.
        type: What the run computes on.
        memory_bytes: That a process may use.
        flops: By number format, FLOP/s of dense matrix products; without a format, it is not there.
        memory_bandwidth: Bytes/s.
        node_size: Devices per node.
        link_bandwidth: Bytes/s in each direction, between devices of a node.
        network_bandwidth: Bytes/s in each direction, per device, between nodes.
        efficiency: How much of all these is reached.
        latency: Seconds that a collective takes beside its transfer.
    """

    name: str
    title: str
    type: Literal["cuda", "cpu"]
    memory_bytes: int
    flops: dict[str, float]
    memory_bandwidth: float
    node_size: int
    link_bandwidth: float
    network_bandwidth: float
    efficiency: Efficiency
    latency: float


_HOPPER = Efficiency(matrix_products=0.76, fp8_products=0.73, attention=0.45, memory=0.5, link=0.7, network=0.75)
_AMPERE = replace(_HOPPER, matrix_products=0.78, attention=0.45)
_PCIE = replace(_AMPERE, matrix_products=0.8, fp8_products=0.7)


def _gpu(
    name: str,
    torch_name: str,
    *,
    gib: float,
    terabytes: float,
    link: float,
    network: float,
    efficiency: Efficiency,
    node_size: int = 8,
) -> Device:
    """Describe a GPU: memory in GiB, its bandwidth in TB/s, links and network in GB/s in each direction."""
    rates = {kind: peak_tflops(torch_name, kind) for kind in ("bf16", "fp8")}
    return Device(
        name=name,
        title=torch_name,
        type="cuda",
        memory_bytes=int(gib * 2**30),
        # In FP32 the products run as TF32, at half the rate of BF16.
        flops={kind: rate * 1e12 for kind, rate in rates.items() if rate} | {"fp32": (rates["bf16"] or 0) * 0.5e12},
        memory_bandwidth=terabytes * 1e12,
        node_size=node_size,
        link_bandwidth=link * 1e9,
        network_bandwidth=network * 1e9,
        efficiency=efficiency,
        latency=15e-6,
    )


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("h100", "NVIDIA H100 SXM", gib=79.1, terabytes=3.35, link=450, network=50, efficiency=_HOPPER),
        _gpu("h200", "NVIDIA H200", gib=139.8, terabytes=4.8, link=450, network=50, efficiency=_HOPPER),
        _gpu("h100-pcie", "NVIDIA H100 PCIe", gib=79.1, terabytes=2.0, link=50, network=50, efficiency=_HOPPER),
        _gpu("b200", "NVIDIA B200", gib=178.3, terabytes=8.0, link=900, network=50, efficiency=_HOPPER),
        _gpu("a100-80", "NVIDIA A100 80GB", gib=79.1, terabytes=2.039, link=300, network=25, efficiency=_AMPERE),
        _gpu("a100-40", "NVIDIA A100 40GB", gib=39.4, terabytes=1.555, link=300, network=25, efficiency=_AMPERE),
        _gpu("l40s", "NVIDIA L40S", gib=44.4, terabytes=0.864, link=25, network=25, efficiency=_PCIE),
        _gpu("rtx-4090", "NVIDIA GeForce RTX 4090", gib=23.5, terabytes=1.008, link=12, network=12, efficiency=_PCIE),
    )
}
"""By the name that `--gpu` takes. Network: one adapter of 400 Gb/s per Hopper or Blackwell GPU, 200 per Ampere GPU."""

NAMES = (*GPUS, "cpu")

_IN_FULL = {
    "h100-pcie": r"h100 pcie\b",
    "h200": r"h200\b",
    "h100": r"h100\b",
    "b200": r"b200\b",
    "l40s": r"l40s\b",
    "a100-80": r"a100\b.*80",
    "a100-40": r"a100\b",
    "rtx-4090": r"rtx 4090\b",
}
"""What is in the names that drivers have for them; the first that is found counts."""

_CPU_EFFICIENCY = Efficiency(matrix_products=0.8, fp8_products=0.8, attention=0.2, memory=0.5, link=0.5, network=0.5)
_GFLOPS_PER_CORE = 100.0
"""Of FP32 products, by AVX-512: 105 on an AMD EPYC (Zen 4); others have between half and twice as much."""
_BF16_GAIN = {"amx_bf16": 7.0, "avx512_bf16": 4.4}
"""How much faster BF16 products are than FP32's by these instructions, as measured; without any, they are emulated."""


def find_device(name: str, num_devices: int) -> Device:
    """Return the device of a name.

    Args:
        name: One of `NAMES`, or what nvidia-smi calls it; `cpu` is this machine's processor, which the ranks share.
        num_devices: Ranks in all.

    Raises:
        ConfigError: There is no such device.
    """
    if name.lower() == "cpu":
        return this_processor(num_devices)
    found = GPUS.get(name.lower()) or gpu_called(name)
    if found is None:
        guess = nearest(name.lower(), NAMES)
        raise ConfigError(
            f"--gpu {name} is not known" + (f"; did you mean {guess}?" if guess else ""),
            hint=f"known are {', '.join(NAMES)}; of others give --gpu-memory, and the most alike of these",
        )
    return found


def gpu_called(name: str) -> Device | None:
    """Return the GPU that a driver's name means, such as `NVIDIA H100 80GB HBM3`; None if it is not among them."""
    return next((GPUS[known] for known, pattern in _IN_FULL.items() if re.search(pattern, name.lower())), None)


def this_processor(num_ranks: int, *, memory: int | None = None) -> Device:
    """Return one rank's share of this machine's processor and memory.

    Args:
        num_ranks: Ranks that share it.
        memory: Bytes in all; None: what is free now.
    """
    cores, instructions = available_cores() / num_ranks, bf16_instructions()
    gain = max((_BF16_GAIN.get(name, 0.0) for name in instructions), default=0.0) or 0.25
    fp32 = cores * _GFLOPS_PER_CORE * 1e9
    memory = available_memory() if memory is None else memory
    return Device(
        name="cpu",
        title=f"{available_cores()} cores of this machine",
        type="cpu",
        memory_bytes=memory // num_ranks,
        flops={"fp32": fp32, "bf16": fp32 * gain},
        memory_bandwidth=cores * 20e9,
        node_size=num_ranks,
        link_bandwidth=1e9,
        network_bandwidth=1e9,
        efficiency=_CPU_EFFICIENCY,
        latency=300e-6,
    )
