"""Services that plot curves over steps, TensorBoard and Weights & Biases: none of them may end or delay a run."""

import logging
import netrc
import os
import queue
import threading
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, override

from megatron_7b.config import config_to_dict
from megatron_7b.config.schema import RunConfig
from megatron_7b.training.metrics import Metrics, StepMetrics, TaskMetrics, ValidationMetrics, named_values
from megatron_7b.training.run_folder import RunFolder
from megatron_7b.training.sink import Sink

logger = logging.getLogger(__name__)

CLOSING_SECONDS = 60.0
"""How long the end of a run waits for a service to finish."""


class InBackground(Sink):
    """Feeds a sink from a thread of its own, and drops it for the rest of the run once it fails.

    For services that plot curves: a full disk, a lost connection or a slow server must neither end nor delay training.
    metrics.jsonl is not written like this: a run whose steps are not recorded must not continue.
    """

    def __init__(self, sink: Sink) -> None:
        self._name = type(sink).__name__
        self._actions: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._sink = sink
        self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
        self._thread.start()

    @override
    def write_step(self, metrics: StepMetrics) -> None:
        self._actions.put(lambda: self._sink.write_step(metrics))

    @override
    def write_validation(self, metrics: ValidationMetrics) -> None:
        self._actions.put(lambda: self._sink.write_validation(metrics))

    @override
    def write_tasks(self, metrics: TaskMetrics) -> None:
        self._actions.put(lambda: self._sink.write_tasks(metrics))

    @override
    def close(self) -> None:
        self._actions.put(self._sink.close)
        self._actions.put(None)
        self._thread.join(CLOSING_SECONDS)
        if self._thread.is_alive():
            logger.warning("%s did not end within %g s and is left running", self._name, CLOSING_SECONDS)

    def _work(self) -> None:
        try:
            while (action := self._actions.get()) is not None:
                action()
        except Exception as error:  # noqa: BLE001 (whatever a service throws)
            logger.warning("%s failed and gets nothing more in this run: %s", self._name, error)


def _scalars(metrics: Metrics) -> Iterator[tuple[str, float]]:
    """Yield (tag, value) of every known figure, for the services that plot curves over steps."""
    reports = metrics.reports if isinstance(metrics, StepMetrics) else {}
    topics = {name: topic for topic, figures in reports.items() for name in figures}
    for name, value in named_values(metrics).items():
        if name == "step" or value is None:
            continue
        if isinstance(metrics, ValidationMetrics):
            if name.startswith("validation_"):
                yield f"validation/{name.removeprefix('validation_')}", value
        elif isinstance(metrics, TaskMetrics):
            if name in metrics.extra and not name.endswith("_stderr"):
                yield name, value
        else:
            yield f"{topics.get(name, 'train')}/{name}", float(value)


class TensorBoard(Sink):
    """Event files in R/tensorboard, continued without overlap when a run resumes."""

    def __init__(self, folder: RunFolder, *, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what an earlier start wrote about steps that are about to be repeated.
        self._writer: Any = SummaryWriter(str(folder.tensorboard), purge_step=resumed_step + 1)

    @override
    def write_step(self, metrics: StepMetrics) -> None:
        self._add(metrics)

    @override
    def write_validation(self, metrics: ValidationMetrics) -> None:
        self._add(metrics)

    @override
    def write_tasks(self, metrics: TaskMetrics) -> None:
        self._add(metrics)

    @override
    def close(self) -> None:
        self._writer.close()

    def _add(self, metrics: Metrics) -> None:
        for tag, value in _scalars(metrics):
            self._writer.add_scalar(tag, value, metrics.step)


class WeightsAndBiases(Sink):
    """A run of Weights & Biases with the run folder's name; a resumed run continues the same curves."""

    def __init__(self, wandb: ModuleType, folder: RunFolder, config: RunConfig) -> None:
        self._run: Any = wandb.init(
            project=config.telemetry.wandb_project,
            name=folder.root.resolve().name,
            id=_wandb_id(folder),
            resume="allow",
            dir=str(folder.root),
            config=config_to_dict(config),
            mode=_wandb_mode(),
            settings=wandb.Settings(silent=True),
        )
        if self._run.offline:
            logger.info("Weights & Biases is offline; upload later with: wandb sync %s", folder.root / "wandb")

    @override
    def write_step(self, metrics: StepMetrics) -> None:
        self._run.log(dict(_scalars(metrics)), step=metrics.step)

    @override
    def write_validation(self, metrics: ValidationMetrics) -> None:
        self._run.log(dict(_scalars(metrics)), step=metrics.step)

    @override
    def write_tasks(self, metrics: TaskMetrics) -> None:
        self._run.log(dict(_scalars(metrics)), step=metrics.step)

    @override
    def close(self) -> None:
        self._run.finish()


def _wandb_id(folder: RunFolder) -> str:
    """Return the id of this run folder at the service, chosen at its first start."""
    path = folder.root / "wandb_id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def _wandb_mode() -> str:
    """Return the mode that the environment asks for, else `online` if there is an API key and `offline` if not.

    Otherwise a run on a machine without a key would stop and ask for one.
    """
    return os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urllib.parse.urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc().authenticators(str(host)) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def open_services(folder: RunFolder, config: RunConfig, resumed_step: int) -> Iterator[Sink]:
    """Yield TensorBoard and Weights & Biases if configured; one that cannot be opened is left out."""
    telemetry = config.telemetry
    if telemetry.tensorboard:
        try:
            yield TensorBoard(folder, resumed_step=resumed_step)
        except (ImportError, OSError) as error:
            logger.warning("no TensorBoard files are written: %s", error)
    if telemetry.wandb:
        import wandb

        try:
            yield WeightsAndBiases(wandb, folder, config)
        except (wandb.Error, OSError) as error:
            logger.warning("Weights & Biases gets nothing in this run: %s", error)
