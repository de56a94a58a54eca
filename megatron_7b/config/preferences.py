"""What preferences may be learned with, as a configuration names it."""

_OF_PAIRS = (
    *("rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected"),
    *("logps/chosen", "logps/rejected"),
)
PREFERENCE_LOSSES: dict[str, tuple[str, ...]] = {
    "sigmoid": _OF_PAIRS,
    "robust": _OF_PAIRS,
    "hinge": _OF_PAIRS,
    "ipo": _OF_PAIRS,
    "orpo": (*_OF_PAIRS, "nll_loss", "log_odds_ratio", "log_odds_chosen"),
    "kto": ("kl", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"),
}
"""Losses by name, each with the means that it reports, as trl names them."""
