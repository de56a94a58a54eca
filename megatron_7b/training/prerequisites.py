"""What a run needs and can be looked at without torch: a mistake is answered at once, before any rank is started."""

from importlib.util import find_spec
from pathlib import Path

from megatron_7b.config.schema import DataConfig, RunConfig, TelemetryConfig
from megatron_7b.data import IndexedDataset, parse_blend
from megatron_7b.errors import ConfigError
from megatron_7b.training.run_folder import RunFolder, check_run_folder


def check_prerequisites(config: RunConfig, run_dir: Path) -> None:
    """Refuse a run whose folder, corpora or services cannot be used. Only reads. Collective: none.

    Args:
        config: The run, checked.
        run_dir: The run folder, which need not exist yet.

    Raises:
        ConfigError: The run folder cannot be made or holds another model, or a package is missing.
        DataFormatError: A corpus is truncated or foreign.
    """
    check_run_folder(RunFolder(run_dir), config)
    check_telemetry(config.telemetry)
    open_corpora(config.data)


def check_telemetry(telemetry: TelemetryConfig) -> None:
    """Refuse a configuration that needs a package which is not installed.

    Raises:
        ConfigError: Weights & Biases is asked for and not installed.
    """
    if telemetry.wandb and find_spec("wandb") is None:
        raise ConfigError(
            "telemetry.wandb is true, but the package wandb is not installed",
            hint="pip install 'megatron-7b[wandb]', or set telemetry.wandb to false (TensorBoard needs nothing)",
        )


def open_corpora(data: DataConfig) -> None:
    """Open every corpus once: what a truncated file is the cause of is not reported as something else later.

    Raises:
        DataFormatError: One is truncated, foreign or inconsistent.
    """
    for entries in (data.train, data.valid):
        for part in parse_blend(entries) if entries else ():
            IndexedDataset(part.prefix)
