"""How evenly the experts of a mixture are used, as megatron-core's routers have recorded it."""

from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

from megatron_7b.config.schema import ModelConfig
from megatron_7b.parallel.groups import process_groups

NAME = "load_balancing_loss"
"""megatron-core's name: 1 where all experts are used alike, up to their number where a few are used alone."""


def take_balance(model: ModelConfig, num_microbatches: int) -> dict[str, tuple[float, float]]:
    """Return the loss that evens out the use of experts, before its coefficient, and forget what was recorded.

    Args:
        model: The shape of the model.
        num_microbatches: Of this rank, since the last call.

    Returns:
        A mean over layers and microbatches by name, as a sum and a number; nothing if the loss has no weight.

    Collective: all ranks.
    """
    if not model.moe_aux_loss_coeff:
        return {}
    found: dict[str, float] = {}
    get_moe_metrics_tracker().report(
        loss_scale=1 / num_microbatches,
        iteration=0,
        track_names=NAME,
        num_layers=model.num_layers,
        total_loss_dict=found,
        pg_collection=process_groups(),
    )
    return {NAME: (float(found[NAME]), 1.0)}
