"""What people look at after an evaluation: one page per evaluation, and two evaluations beside one another."""

from megatron_7b.evaluation.report.comparison import ComparedMeasure, compare_results
from megatron_7b.evaluation.report.page import render_results, write_report

__all__ = ["ComparedMeasure", "compare_results", "render_results", "write_report"]
