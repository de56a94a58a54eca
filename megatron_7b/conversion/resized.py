"""The configuration of a run whose model has become another one, larger or smaller."""

from dataclasses import replace

from megatron_7b.config import check_config
from megatron_7b.config.schema import ModelConfig, ParallelConfig, PrecisionConfig, RunConfig
from megatron_7b.conversion.progress import Report
from megatron_7b.errors import ConfigError


def config_of_resized(config: RunConfig, model: ModelConfig, report: Report, *, size: str) -> RunConfig:
    """Put another model into the configuration of a run, whose layout it may not fit.

    Args:
        config: Of the run.
        model: The other model.
        report: Takes the warning that the layout was left.
        size: What the model is beside the run's, for that warning: `larger` or `smaller`.

    Raises:
        ConfigError: There can be no such model.
    """
    resized = replace(config, model=model, checkpoint=replace(config.checkpoint, initialize_from=None))
    try:
        check_config(resized)
    except ConfigError:
        precision = replace(
            config.precision, fp8_param_gather=False, optimizer_state_dtype=PrecisionConfig().optimizer_state_dtype
        )
        resized = replace(resized, parallel=ParallelConfig(), precision=precision)
        check_config(resized)
        report("warning", f"the layout of the run does not fit the {size} model: its configuration is for one rank now")
    return resized
