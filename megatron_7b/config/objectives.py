"""What a model may be trained to predict, as a configuration names it."""

OBJECTIVES: dict[str, tuple[str, ...]] = {
    "causal": ("decoder",),
    "chat": ("decoder",),
    "masked": ("encoder",),
    "span": ("encoder_decoder",),
}
"""Objectives by name, each with the kinds of models that it trains; a kind's first one is its default. Add to it before
a configuration that names the addition is read."""
