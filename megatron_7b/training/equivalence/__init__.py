"""The same training steps at several layouts, compared parameter by parameter: which part first, when, and how far.

`layouts.py` reads what a user writes, `recording.py` runs on the ranks of one layout, `comparing.py` reads what they
have recorded. The first and the last need no torch to be imported.
"""

from megatron_7b.training.equivalence.comparing import (
    FP32,
    Band,
    Comparison,
    Deviation,
    compare_recordings,
    measure_rounding,
)
from megatron_7b.training.equivalence.layouts import OPTIONS, NamedLayout, read_layouts
from megatron_7b.training.equivalence.recording import in_fp32, record_steps

__all__ = [
    "FP32",
    "OPTIONS",
    "Band",
    "Comparison",
    "Deviation",
    "NamedLayout",
    "compare_recordings",
    "in_fp32",
    "measure_rounding",
    "read_layouts",
    "record_steps",
]
