"""Learning-rate schedules as pure functions of the step.

Steps are numbered from 1: `learning_rate(1, …)` is the rate of the first update, `learning_rate(train_steps, …)` that
of the last. Nothing is carried from step to step, so a resumed run continues on exactly the same curve, and any tool
can draw the schedule of a run from its configuration alone.
"""

import math

from megatron_7b.config.optimizer_config import OptimizerConfig


def learning_rate(step: int, config: OptimizerConfig, train_steps: int) -> float:
    """Return the learning rate of one update.

    Warm-up rises linearly and reaches `lr` at its last step: step k of n uses lr·k/n, so the first update already moves
    the weights. The decay begins at the step after and reaches `min_lr` exactly at
    step `lr_decay_steps` (`train_steps` where that is None), beyond which it stays there.

    Args:
        step: Number of the update, counted from 1.
        config: The schedule's style and lengths.
        train_steps: Length of the run in updates; only used where `lr_decay_steps` is None.

    Returns:
        The rate, between 0 and `lr` during warm-up and between `min_lr` and `lr` afterwards.

    Raises:
        ValueError: `step` is less than 1.

    Source: cosine, Loshchilov and Hutter 2017 (SGDR), one half-period without restarts; wsd, Hu et al. 2024 (MiniCPM),
        with the `1 - sqrt` cool-down that Hägele et al. 2024 found better than a linear one.
    """
    if step < 1:
        raise ValueError(f"steps are counted from 1, got {step}")
    warmup_steps = config.warmup_steps(train_steps)
    if step <= warmup_steps:
        return config.lr * (step / warmup_steps)  # in this order, the last one is exactly lr
    if config.lr_decay_style == "constant":
        return config.lr
    return config.min_lr + (config.lr - config.min_lr) * _share_above_minimum(step, config, train_steps)


def _share_above_minimum(step: int, config: OptimizerConfig, train_steps: int) -> float:
    """Return which share of the way from min_lr to lr is left after the warm-up: 1 falling to 0."""
    decay_end = config.lr_decay_steps if config.lr_decay_steps is not None else train_steps
    warmup_steps = config.warmup_steps(train_steps)
    match config.lr_decay_style:
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * _progress(step, warmup_steps, decay_end)))
        case "linear":
            return 1.0 - _progress(step, warmup_steps, decay_end)
        case "wsd":
            length = config.lr_wsd_decay_steps if config.lr_wsd_decay_steps is not None else math.ceil(decay_end / 10)
            decay_start = max(decay_end - length, warmup_steps)
            return 1.0 - math.sqrt(_progress(step, decay_start, decay_end))
        case style:
            raise ValueError(f"no learning-rate schedule is called {style!r}")


def _progress(step: int, start: int, end: int) -> float:
    """Return how far `step` is between `start` (0.0) and `end` (1.0), held at both ends; 1.0 for an empty span."""
    if step >= end:
        return 1.0
    return max(0.0, (step - start) / (end - start))
