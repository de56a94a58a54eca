"""Rates that data sheets promise for GPUs. Imports no torch."""

import re
from typing import Literal, NamedTuple

MatmulFormat = Literal["fp32", "bf16", "fp8"]


class PeakRate(NamedTuple):
    """Dense matrix-product rate of a GPU with FP32 accumulation, in TFLOP/s; None where it lacks the format."""

    bf16: float
    fp8: float | None


# The first pattern that is found in torch's device name decides, so narrow ones come before broad ones.
# Source: NVIDIA's and AMD's data sheets; figures "with sparsity" are halved.
_PEAK_RATES: tuple[tuple[str, PeakRate], ...] = (
    (r"\bGB300\b", PeakRate(2500.0, 5000.0)),
    (r"\bGB200\b", PeakRate(2500.0, 5000.0)),
    (r"\bB300\b", PeakRate(2250.0, 4500.0)),
    (r"\bB200\b", PeakRate(2250.0, 4500.0)),
    (r"\bB100\b", PeakRate(1750.0, 3500.0)),
    (r"\bGH200\b", PeakRate(989.4, 1978.9)),
    (r"\bH200 NVL\b", PeakRate(835.5, 1670.5)),
    (r"\bH[28]00\b", PeakRate(989.4, 1978.9)),
    (r"\bH100 NVL\b", PeakRate(835.5, 1670.5)),
    (r"\bH100 PCIe\b", PeakRate(756.0, 1513.0)),
    (r"\bH100\b", PeakRate(989.4, 1978.9)),
    (r"\bH20\b", PeakRate(148.0, 296.0)),
    (r"\bA[18]00\b", PeakRate(311.9, None)),
    (r"\bA40\b", PeakRate(149.7, None)),
    (r"\bA30\b", PeakRate(165.0, None)),
    (r"\bA10\b", PeakRate(125.0, None)),
    (r"\bL40S\b", PeakRate(362.1, 733.0)),
    (r"\bL40\b", PeakRate(181.1, 362.1)),
    (r"\bL4\b", PeakRate(121.0, 242.0)),
    (r"\bRTX 6000 Ada\b", PeakRate(364.3, 728.5)),
    (r"\bRTX A6000\b", PeakRate(154.8, None)),
    # Not those of laptops and other variants, such as `RTX 4090 D`, which are slower.
    (r"\bRTX 5090$", PeakRate(209.5, 419.0)),
    (r"\bRTX 4090$", PeakRate(165.2, 330.3)),
    (r"\bRTX 3090$", PeakRate(71.2, None)),
    (r"\bMI355X\b", PeakRate(2516.6, 5033.2)),
    (r"\bMI350X\b", PeakRate(2306.9, 4613.7)),
    (r"\bMI325X\b", PeakRate(1307.4, 2614.9)),
    (r"\bMI300X\b", PeakRate(1307.4, 2614.9)),
    (r"\bMI250X\b", PeakRate(191.5, None)),  # one of the two dies, which is what torch calls a device
)


def peak_tflops(device_name: str, matmul_format: MatmulFormat) -> float | None:
    """Return the highest dense matrix-product rate that a data sheet promises for a device.

    Args:
        device_name: As `torch.cuda.get_device_name` says it, e.g. `NVIDIA H100 80GB HBM3`.
        matmul_format: Number format of the products. Nothing is promised for fp32, since whether it runs as TF32 is a
            setting and not a property of the device.

    Returns:
        TFLOP/s, or None where it is not known, such as of a slice of a GPU (MIG).
    """
    if matmul_format == "fp32" or re.search(r"\bMIG\b", device_name):
        return None
    for pattern, rate in _PEAK_RATES:
        if re.search(pattern, device_name, flags=re.IGNORECASE):
            return rate.bf16 if matmul_format == "bf16" else rate.fp8
    return None
