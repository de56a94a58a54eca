"""What came of pruning: figures for people, and for JSON. NumPy only."""

import math
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_7b.compression.pruning.plan import PruningPlan
from megatron_7b.compression.pruning.scores import Kept, Scores, perplexity
from megatron_7b.config import RunConfig
from megatron_7b.model.sizes import count_parameters


@dataclass(frozen=True)
class Measured:
    """What was measured, and what was chosen for it.

    Attributes:
        scores: Of the model.
        kept: What of it is kept.
        loss_before: Of the model on held-out text, nats per token.
        loss_after: Of the smaller model.
    """

    scores: Scores
    kept: Kept
    loss_before: float = math.nan
    loss_after: float = math.nan


@dataclass(frozen=True)
class PrunedCheckpoint:
    """What came of it.

    Attributes:
        folder: The checkpoint.
        config: Its configuration: that of the run that trained the larger model, with the smaller one in it.
        plan: Both shapes.
        measured: Scores, what was chosen, and the losses.
        held_out_tokens: What the losses are over.
        bytes_per_parameter: As stored.
    """

    folder: Path
    config: RunConfig
    plan: PruningPlan
    measured: Measured = field(repr=False)
    held_out_tokens: int
    bytes_per_parameter: int

    @property
    def parameters(self) -> tuple[int, int]:
        """Parameters before and after."""
        vocab_size = self.plan.source.vocab_size or 0
        before, after = (
            count_parameters(model, vocab_size=vocab_size) for model in (self.plan.source, self.plan.target)
        )
        return before, after

    @property
    def perplexities(self) -> tuple[float, float]:
        """On held-out text, before and after."""
        return perplexity(self.measured.loss_before), perplexity(self.measured.loss_after)

    def rows(self) -> list[list[str]]:
        """Return a table: each size before and after, and the share that is left."""
        source, target = self.plan.source, self.plan.target
        before, after = self.parameters
        sizes: list[tuple[str, int, int]] = [
            ("parameters", before, after),
            ("bytes of weights", before * self.bytes_per_parameter, after * self.bytes_per_parameter),
            ("layers", source.num_layers, target.num_layers),
            ("hidden size", source.hidden_size, target.hidden_size),
            ("neurons of an MLP", source.ffn_hidden_size, target.ffn_hidden_size),
            ("query heads", source.num_attention_heads, target.num_attention_heads),
            ("key-value heads", source.query_groups, target.query_groups),
        ]
        rows = [["", "before", "after", "left"]]
        rows += [[name, f"{a:,}", f"{b:,}", f"{b / a:.1%}"] for name, a, b in sizes if a != b or name == "parameters"]
        first, second = self.perplexities
        tokens = f"perplexity of {self.held_out_tokens:,} held-out tokens"
        return [*rows, [tokens, f"{first:.3f}", f"{second:.3f}", f"× {second / first:.3f}"]]

    def removed_lines(self) -> list[str]:
        """Say what was removed, a line for each kind."""
        found, lines = self.to_dict(), []
        if "layers" in found:
            how = found["layers"]["score"].replace("_", " ")
            lines.append(f"removed layers {', '.join(map(str, found['layers']['removed']))} (from 0; by {how})")
        if "heads_kept" in found:
            lines.append("removed heads layer by layer; `pruning.json` in the checkpoint lists those that are kept")
        if "neurons_kept_score_share" in found:
            shares = found["neurons_kept_score_share"]
            worst = min(shares, key=shares.__getitem__)
            lines.append(f"kept neurons have {shares[worst]:.1%} or more of their layer's score (least: layer {worst})")
        if "channels" in found:
            channels = found["channels"]
            lines.append(
                f"removed {len(channels['removed'])} channels with {1 - channels['kept_score_share']:.1%} of the score"
            )
        return lines

    def healing_command(self) -> str:
        """Return the command that trains the smaller model further with the settings of the larger one's run."""
        corpus = [] if self.config.data.train else ["--data.train", "PREFIX_text_document"]
        words = [
            *("megatron-7b", "pretrain", "--config", str(self.folder / "config.yaml")),
            *("--checkpoint.initialize-from", str(self.folder), *corpus),
            *("--run-dir", f"{self.folder}_run"),
        ]
        return shlex.join(words)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON has it."""
        before, after = self.parameters
        return {
            "output": str(self.folder),
            "parameters": {"before": before, "after": after},
            "perplexity": {
                "before": _finite(self.perplexities[0]),
                "after": _finite(self.perplexities[1]),
                "held_out_tokens": self.held_out_tokens,
            },
            **describe_pruning(self.plan, self.measured),
        }


def describe_pruning(plan: PruningPlan, measured: Measured) -> dict[str, Any]:
    """Return what was removed, by which scores, as JSON has it."""
    kept, source, target = measured.kept, plan.source, plan.target
    found: dict[str, Any] = {"sizes": plan.describe(), "calibration_loss": _finite(measured.scores.loss)}
    if plan.num_removed:
        found["layers"] = {
            "removed": list(kept.removed),
            "score": "given" if plan.options.drop_layers is not None else plan.options.depth_score,
            "scores": [{"layers": list(one.layers), "score": _finite(one.score)} for one in kept.candidates],
        }
    if source.num_attention_heads != target.num_attention_heads:
        found["heads_kept"] = {
            str(layer): [{"group": group, "queries": list(members)} for group, members in groups]
            for layer, groups in zip(kept.layers, kept.groups, strict=True)
        }
    if source.ffn_hidden_size != target.ffn_hidden_size:
        found["neurons_kept_score_share"] = {
            str(layer): _share(measured.scores.units[layer], units)
            for layer, units in zip(kept.layers, kept.units, strict=True)
        }
    if source.hidden_size != target.hidden_size:
        removed = sorted(set(range(source.hidden_size)) - set(kept.channels.tolist()))
        found["channels"] = {"removed": removed, "kept_score_share": _share(measured.scores.channels, kept.channels)}
    return found


def _share(scores: Any, kept: Any) -> float:
    total = float(scores.sum())
    return round(float(scores[kept].sum()) / total, 4) if total else 1.0


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
