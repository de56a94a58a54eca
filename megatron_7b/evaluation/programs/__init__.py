"""Programs that a checkpoint writes, judged by running their tests: pass@k."""

from megatron_7b.evaluation.programs.evaluating import ProgramResults, evaluate_programs
from megatron_7b.evaluation.programs.pass_at_k import estimate_pass_at_k

__all__ = ["ProgramResults", "estimate_pass_at_k", "evaluate_programs"]
