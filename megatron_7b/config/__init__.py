"""Configuration: typed sections, presets, loading, and the checks that run before anything else. Imports no torch."""

from megatron_7b.config.loading import (
    check_config,
    config_from_dict,
    config_to_dict,
    dump_config,
    load_config,
    override_config,
    save_config,
)
from megatron_7b.config.optimizer_config import OptimizerConfig
from megatron_7b.config.schema import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    PrecisionConfig,
    RopeScalingConfig,
    RunConfig,
    RuntimeConfig,
    TelemetryConfig,
    TrainingConfig,
)
from megatron_7b.config.sources import preset_names, read_source

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "RopeScalingConfig",
    "RunConfig",
    "RuntimeConfig",
    "TelemetryConfig",
    "TrainingConfig",
    "check_config",
    "config_from_dict",
    "config_to_dict",
    "dump_config",
    "load_config",
    "override_config",
    "preset_names",
    "read_source",
    "save_config",
]
