"""Decoding steps whose shapes stay the same from token to token, each started on a GPU as one CUDA graph.

A token of a 7B model takes some hundred kernels of a few microseconds each, and starting them one by one takes the
host longer than they run. In a step of fixed shape attention reads all positions up to a bound, masked where a text
does not reach so far, and tokens and positions lie in tensors that stay where they are.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_SHORTEST_REACH = 256
_MOST_GRAPHS = 64
"""A graph of a 7B model has some hundred nodes, a few megabytes."""
_TOLERANCE = 0.02
"""Of the largest logit: products in a graph may be computed by another algorithm than outside, in BF16 too."""


class _Shape(NamedTuple):
    num_rows: int
    reach: int


class _Step:
    """The steps of one shape: the first one is run, which also prepares what is compiled or chosen at first use."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.inputs = torch.zeros(2, num_rows, 1, dtype=torch.int64, device=device)
        self.has_run = False
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None


class FixedSteps:
    """Appends a token to each row of a cache, in steps of fixed shapes.

    Args:
        run: Computes the logits [b, v] after tokens [b, 1] at positions [b, 1], where attention reads the first `reach`
            positions of the cache, from tensors that stay where they are until `forget`.
        vocab_size: Columns of the logits that are tokens.
        device: Where the model is. On a GPU the second step of a shape is captured and those after it are replayed; on
            a CPU there are no graphs, and every step is run.
    """

    def __init__(self, run: Callable[[Tensor, Tensor, int], Tensor], vocab_size: int, device: torch.device) -> None:
        self._run = run
        self._vocab_size = vocab_size
        self._device = device
        self._captures = device.type == "cuda"
        self._pool: Any = None  # of memory, which the graphs share
        self._steps: dict[_Shape, _Step] = {}

    @property
    def num_graphs(self) -> int:
        """Shapes that are replayed."""
        return sum(step.graph is not None for step in self._steps.values())

    def forget(self) -> None:
        """Drop all graphs: a tensor that they read or write is another one from now on."""
        self._steps.clear()

    def take(self, tokens: Sequence[int], positions: Sequence[int], num_positions: int) -> Tensor:
        """Append a token to each of the rows [0, b).

        Args:
            tokens: Of each row, [b].
            positions: Where they stand, [b].
            num_positions: That the cache has.

        Returns:
            Logits [b, v], valid until the next step.
        """
        shape = _Shape(len(tokens), reach_of(max(positions) + 1, num_positions))
        step = self._steps.pop(shape, None) or _Step(len(tokens), self._device)
        self._steps[shape] = step  # at the end: the oldest come first
        if len(self._steps) > _MOST_GRAPHS:
            del self._steps[next(iter(self._steps))]
        step.inputs.copy_(torch.tensor([tokens, positions]).unsqueeze(2))
        if step.graph is not None:
            assert step.logits is not None
            step.graph.replay()
            return step.logits
        logits = self._run(step.inputs[0], step.inputs[1], shape.reach)
        if step.has_run and self._captures:
            self._capture(step, shape, logits)
        step.has_run = True
        return logits

    def _capture(self, step: _Step, shape: _Shape, expected: Tensor) -> None:
        """Capture a step that has just been run; running it again writes the same keys and values once more."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                logits = self._run(step.inputs[0], step.inputs[1], shape.reach)
            graph.replay()
            known, found = (x[:, : self._vocab_size].float() for x in (expected, logits))
            if not bool((found - known).abs().max() <= _TOLERANCE * known.abs().max()):
                raise RuntimeError("its logits are others than those of the step that was captured")
        except RuntimeError as error:
            self._captures = False
            reason = str(error).partition("\n")[0]
            logger.warning("decoding goes on without CUDA graphs, several times slower for small models: %s", reason)
            return
        self._pool = graph.pool()
        step.graph, step.logits = graph, logits


def reach_of(num_needed: int, num_positions: int) -> int:
    """Return how many positions a step reads that needs some of them.

    Few numbers serve all lengths; they are at most 255 or a quarter too large.

    Args:
        num_needed: Positions of the longest text, its new token included.
        num_positions: That the cache has, at least as many.
    """
    unit = max(_SHORTEST_REACH, 1 << max(0, num_needed.bit_length() - 3))
    return min(-(-num_needed // unit) * unit, num_positions)
