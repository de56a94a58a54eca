"""What an evaluation finds; needs no torch."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class CorpusLoss:
    """How well a model predicts a corpus.

    Attributes:
        loss: Mean over all predicted tokens [nats per token].
        tokens: Predicted tokens.
    """

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """e^loss, infinite beyond a float."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


@dataclass(frozen=True)
class EvaluationProgress:
    """How far an evaluation is.

    Attributes:
        windows: Windows done.
        total_windows: Windows to do.
        so_far: Loss on the windows done.
    """

    windows: int
    total_windows: int
    so_far: CorpusLoss
