"""lm-evaluation-harness on our own checkpoints, at any layout: its tasks, prompts and measures, our model."""

from megatron_7b.evaluation.harness.results import TaskResults
from megatron_7b.evaluation.harness.running import HarnessOptions, evaluate_tasks

__all__ = ["HarnessOptions", "TaskResults", "evaluate_tasks"]
