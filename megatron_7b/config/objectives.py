"""What a model may be trained to predict, as a configuration names it."""

OBJECTIVES: dict[str, tuple[str, ...]] = {
    "causal": ("decoder",),
    "chat": ("decoder",),
    "preference": ("decoder",),
    "masked": ("encoder",),
    "span": ("encoder_decoder",),
    "text_classification": ("decoder", "encoder"),
    "token_classification": ("decoder", "encoder"),
    "question_answering": ("decoder", "encoder"),
    "embedding": ("decoder", "encoder"),
    "sequence_to_sequence": ("decoder", "encoder_decoder"),
}
"""Objectives by name, each with the kinds of models that it trains; a kind's first one is its default. Add to it before
a configuration that names the addition is read."""

OF_HEADS: dict[str, str] = {
    "sequence_classification": "text_classification",
    "token_classification": "token_classification",
    "question_answering": "question_answering",
}
"""What a model with a head in the place of its output layer is trained for; nothing else trains it."""
