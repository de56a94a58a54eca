"""Training: `assemble` builds everything, `step` does one update, `loop` repeats it, `hooks` act around it."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_7b.config.schema import RunConfig
from megatron_7b.runtime.process.logs import configure_logging, loading
from megatron_7b.runtime.process.signals import StopRequest
from megatron_7b.training.prerequisites import check_prerequisites
from megatron_7b.training.run_config import load_run_config
from megatron_7b.training.run_plan import RunPlan, plan_run

__all__ = ["RunPlan", "load_run_config", "plan_run", "pretrain"]

if TYPE_CHECKING:
    from megatron_7b.model.adapter import Adapter
    from megatron_7b.training.hooks import Hook


def pretrain(
    config: RunConfig,
    run_dir: Path,
    stop_request: StopRequest | None = None,
    *,
    hooks: "Sequence[Hook]" = (),
    adapter: "Adapter | None" = None,
) -> int:
    """Train a model in a run folder; see `training.loop.pretrain`, which this calls.

    What comes first here needs no torch: what cannot be used is refused at once, and logging is in place before
    libraries are imported that warn while they load.
    """
    configure_logging(int(os.environ.get("RANK", "0")))
    check_prerequisites(config, run_dir)
    with loading("torch and megatron-core"):
        from megatron_7b.training import loop

    return loop.pretrain(config, run_dir, stop_request, hooks=hooks, adapter=adapter)
