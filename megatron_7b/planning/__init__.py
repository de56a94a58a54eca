"""Planning: will a run fit, how fast will it be, and which layout is best, before any device is touched.

    from megatron_7b.config import load_config
    from megatron_7b.planning import plan

    found = plan(load_config("llama2_7b"), gpus=8, gpu="h100")
    found.best.layout(), found.best.memory.as_dict(), found.best.tokens_per_second_per_gpu

Nothing here imports torch.
"""

from megatron_7b.planning.advice import Advice, what_would_fit
from megatron_7b.planning.automatic import AUTO, Choice, choose_layout
from megatron_7b.planning.candidate import Candidate
from megatron_7b.planning.devices import NAMES, Device
from megatron_7b.planning.memory import RankMemory
from megatron_7b.planning.planner import Plan, expected_memory, plan
from megatron_7b.planning.step_time import StepTime

__all__ = [
    "AUTO",
    "NAMES",
    "Advice",
    "Candidate",
    "Choice",
    "Device",
    "Plan",
    "RankMemory",
    "StepTime",
    "choose_layout",
    "expected_memory",
    "plan",
    "what_would_fit",
]
