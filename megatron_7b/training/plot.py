"""loss.png: training and validation loss over the steps and tokens of a run, drawn from its metrics.jsonl."""

import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_7b.files import replacing
from megatron_7b.training.metrics import format_count
from megatron_7b.training.run_folder import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike, NDArray

MAX_POINTS = 4000
"""Points of the raw curve that are drawn; more only make the file larger and the line thicker."""

_TRAINING, _VALIDATION, _SKIPPED, _QUIET = "#2463a8", "#d1495b", "#8a8a8a", "#5b6470"


@dataclass
class LossCurves:
    """What a metrics file says about losses, column by column."""

    steps: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    skipped_steps: list[int] = field(default_factory=list)
    validation_steps: list[int] = field(default_factory=list)
    validation_losses: list[float] = field(default_factory=list)


def read_loss_curves(metrics: Path) -> LossCurves:
    """Read the finite losses of a metrics file, and which steps were skipped."""
    curves = LossCurves()
    for _, values in read_metrics(metrics):
        step, loss, validation_loss = values.get("step"), values.get("loss"), values.get("validation_loss")
        if not isinstance(step, int):
            continue
        if values.get("skipped"):
            curves.skipped_steps.append(step)
        elif isinstance(loss, int | float):
            curves.steps.append(step)
            curves.tokens.append(int(str(values.get("consumed_tokens", 0))))
            curves.losses.append(float(loss))
        if isinstance(validation_loss, int | float):
            curves.validation_steps.append(step)
            curves.validation_losses.append(float(validation_loss))
    return curves


def plot_loss(metrics: Path, picture: Path, *, title: str = "") -> bool:
    """Draw the loss curves into a PNG file, which appears complete or not at all.

    Args:
        metrics: A run's metrics.jsonl.
        picture: The PNG to write.
        title: What is written above the curves.

    Returns:
        Whether there was anything to draw.
    """
    curves = read_loss_curves(metrics)
    if not curves.steps and not curves.validation_steps:
        return False
    # The object-oriented interface: pyplot would keep global state and might look for a screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 5.2), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    _draw_losses(axes, curves)
    _dress(axes, curves, title)
    with replacing(picture) as beside:
        FigureCanvasAgg(figure).print_png(beside)
    return True


def centred_mean(values: list[float], window: int) -> list[float]:
    """Return the mean of the values within half a window on either side of each (fewer at the ends).

    Centred, because a trailing mean would lag behind a falling loss and look worse than it is.
    """
    half = window // 2
    sums = [0.0, *itertools.accumulate(values)]
    means = []
    for index in range(len(values)):
        start, end = max(0, index - half), min(len(values), index + half + 1)
        means.append((sums[end] - sums[start]) / (end - start))
    return means


def _draw_losses(axes: "Axes", curves: LossCurves) -> None:
    stride = math.ceil(len(curves.steps) / MAX_POINTS) or 1
    window = len(curves.steps) // 50
    is_long = window >= 3
    axes.plot(
        curves.steps[::stride],
        curves.losses[::stride],
        color=_TRAINING,
        linewidth=0.8 if is_long else 1.6,
        alpha=0.3 if is_long else 1.0,
        marker="o" if len(curves.steps) <= 30 else None,
        markersize=3,
        label="training",
    )
    if is_long:
        means = centred_mean(curves.losses, window)[::stride]
        axes.plot(curves.steps[::stride], means, color=_TRAINING, linewidth=1.8, label=f"mean of {window} steps")
    if curves.validation_steps:
        steps, losses = curves.validation_steps, curves.validation_losses
        label = f"validation, last {losses[-1]:.3f}"
        axes.plot(steps, losses, color=_VALIDATION, linewidth=1.4, marker="o", markersize=4, label=label)
    if curves.skipped_steps:
        along_bottom = axes.get_xaxis_transform()
        heights = [0.02] * len(curves.skipped_steps)
        axes.plot(curves.skipped_steps, heights, "x", color=_SKIPPED, transform=along_bottom, label="skipped steps")


def _dress(axes: "Axes", curves: LossCurves, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step", color=_QUIET)
    axes.set_ylabel("loss per token (nats)", color=_QUIET)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(True, color="#e3e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_QUIET)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#b6bcc4")
    axes.legend(frameon=False)
    axes.set_xlim(0, max(1, *curves.steps[-1:], *curves.validation_steps[-1:], *curves.skipped_steps[-1:]) * 1.03)
    if len(curves.tokens) >= 2 and curves.tokens[-1] > curves.tokens[0]:
        _add_token_axis(axes, curves)
    if title:
        axes.set_title(title, loc="left", fontsize=11, pad=12)


def _add_token_axis(axes: "Axes", curves: LossCurves) -> None:
    """Put the consumed tokens along the top; a ramped-up batch makes them a curved function of the step."""
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    steps, tokens = np.array([0, *curves.steps]), np.array([0, *curves.tokens])
    # As far again as the run has come, at its last pace, so that the margin on the right has a scale too.
    pace = (tokens[-1] - tokens[-2]) / (steps[-1] - steps[-2])
    steps, tokens = np.append(steps, 2 * steps[-1]), np.append(tokens, tokens[-1] + pace * steps[-1])

    def to_tokens(step: "ArrayLike") -> "ArrayLike":
        values: NDArray[np.float64] = np.interp(np.asarray(step, dtype=np.float64), steps, tokens)
        return values

    def to_steps(token: "ArrayLike") -> "ArrayLike":
        values: NDArray[np.float64] = np.interp(np.asarray(token, dtype=np.float64), tokens, steps)
        return values

    top = axes.secondary_xaxis("top", functions=(to_tokens, to_steps))
    top.set_xlabel("tokens", color=_QUIET)
    top.xaxis.set_major_locator(MaxNLocator(nbins=8))
    top.xaxis.set_major_formatter(lambda tokens, _: format_count(tokens))
    top.tick_params(colors=_QUIET)
    top.spines["top"].set_visible(False)
