"""Rank layout, process groups, and the reductions of what is reported.

`layout` is pure and imports neither torch nor megatron-core; `groups` is the only reader of megatron-core's parallel
state.
"""

from megatron_7b.parallel.layout import ParallelLayout, build_layout

__all__ = ["ParallelLayout", "build_layout"]
