"""What quantising has done to a model: sizes, perplexities, the layer that suffered most. Needs no torch."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class LayerError:
    """How far a matrix is from what it was.

    Attributes:
        name: Of the matrix.
        of_output: Change of its output on text, as a share of the output's size; None without text.
        of_weight: Change of its weights, as a share of their size.
    """

    name: str
    of_output: float | None
    of_weight: float


@dataclass
class Quantized:
    """Figures of a quantised model.

    Attributes:
        output: The folder or file that was written.
        scheme: What it is stored in.
        method: How weights were rounded.
        bytes_before: Of all tensors.
        bytes_after: The same, of what was written.
        perplexity_before: Per token of held-out text, in FP32 arithmetic; None without text.
        perplexity_after: The same with the weights, and inputs of layers, that readers of the output compute with.
        divergence: Kullback-Leibler divergence of the predictions from those before [nats per token]. Perplexity may
            gain by chance what it loses elsewhere; this does not.
        num_tokens: Of the held-out text.
        errors: One for each matrix that was rounded.
        kept: Names of the matrices that stay as they were.
        seconds: Time that it took.
    """

    output: Path
    scheme: str
    method: str
    bytes_before: int = 0
    bytes_after: int = 0
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    divergence: float | None = None
    num_tokens: int = 0
    errors: list[LayerError] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def loss(self) -> float | None:
        """By which share perplexity has grown."""
        if self.perplexity_before is None or self.perplexity_after is None:
            return None
        return self.perplexity_after / self.perplexity_before - 1

    @property
    def largest_error(self) -> LayerError | None:
        """That of the matrix that suffered most."""
        return max(self.errors, key=lambda one: (one.of_output or 0.0, one.of_weight), default=None)

    def to_dict(self) -> dict[str, object]:
        """Return the figures as JSON has them."""
        worst = self.largest_error
        return {
            "output": str(self.output),
            "scheme": self.scheme,
            "method": self.method,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "perplexity_before": self.perplexity_before,
            "perplexity_after": self.perplexity_after,
            "loss": self.loss,
            "divergence": self.divergence,
            "held_out_tokens": self.num_tokens,
            "largest_error": None
            if worst is None
            else {"name": worst.name, "of_output": worst.of_output, "of_weight": worst.of_weight},
            "kept": self.kept,
            "seconds": self.seconds,
        }
