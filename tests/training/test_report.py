"""Where metrics go: sinks that keep up, and services that end no run."""

import dataclasses
import json
import logging
import os
import pty
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_7b.config.schema import RunConfig, TelemetryConfig
from megatron_7b.errors import ConfigError
from megatron_7b.training.metrics import StepMetrics, ValidationMetrics
from megatron_7b.training.prerequisites import check_telemetry
from megatron_7b.training.report import LogLines, MetricsFile, open_sinks
from megatron_7b.training.run_folder import RunFolder, keep_metrics_until, read_metrics
from megatron_7b.training.services import InBackground, WeightsAndBiases
from megatron_7b.training.sink import Sink
from tests.training.test_metrics import step_metrics


def validation(step: int) -> ValidationMetrics:
    return ValidationMetrics(
        step=step, consumed_samples=1, consumed_tokens=1, validation_loss=2.5, validation_perplexity=12.18,
        validation_tokens=512, validation_seconds=0.1,
    )  # fmt: skip


def config(**telemetry: object) -> RunConfig:
    return RunConfig(telemetry=dataclasses.replace(TelemetryConfig(), **telemetry))  # type: ignore[arg-type]


def scalars(folder: RunFolder, tag: str) -> list[tuple[int, float]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder.tensorboard))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_a_line_is_there_as_soon_as_it_is_written(tmp_path: Path) -> None:
    """A process that is killed the next moment has left it."""
    folder = RunFolder(tmp_path)
    sink = MetricsFile(folder)
    sink.write_step(step_metrics(step=1))
    sink.write_validation(validation(1))
    assert [values["step"] for _, values in read_metrics(folder.metrics)] == [1, 1]
    sink.close()


def test_a_resumed_run_draws_each_step_once(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for resumed_step, steps, loss in ((0, (1, 2, 3, 4), 9.0), (2, (3, 4, 5), 1.0)):
        keep_metrics_until(folder, resumed_step)
        with open_sinks(folder, config(), resumed_step=resumed_step) as sinks:
            for step in steps:
                for sink in sinks:
                    sink.write_step(step_metrics(step=step, loss=loss))
        time.sleep(1.1)  # TensorBoard orders event files by whole seconds
    assert [values["step"] for _, values in read_metrics(folder.metrics)] == [1, 2, 3, 4, 5]
    assert scalars(folder, "train/loss") == [(1, 9.0), (2, 9.0), (3, 1.0), (4, 1.0), (5, 1.0)]


def test_the_interval_holds_for_the_log_but_not_for_what_draws_curves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = RunFolder(tmp_path)
    with caplog.at_level(logging.INFO), open_sinks(folder, config(log_interval_steps=3), resumed_step=0) as sinks:
        for step in range(1, 8):
            for sink in sinks:
                sink.write_step(step_metrics(step=step))
    assert [values["step"] for _, values in read_metrics(folder.metrics)] == list(range(1, 8))
    assert [step for step, _ in scalars(folder, "train/loss")] == list(range(1, 8))
    assert [line.split(" · ")[0] for line in caplog.messages] == ["step 1/100", "step 3/100", "step 6/100"]


def test_slow_steps_have_a_line_a_minute(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(0, 1000, 25))  # seconds; LogLines looks once a step, and so does the pace
    monkeypatch.setattr("megatron_7b.training.report.time.monotonic", lambda: float(next(now)))
    sink = LogLines(resumed_step=0, train_steps=100, log_interval_steps=1000)
    with caplog.at_level(logging.INFO):
        for step in range(1, 8):
            sink.write_step(step_metrics(step=step))
    assert [line.split(" · ")[0] for line in caplog.messages] == [f"step {step}/100" for step in (1, 3, 5, 7)]


def test_a_line_of_the_log_says_what_matters(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), open_sinks(RunFolder(tmp_path), config(), resumed_step=2) as sinks:
        for sink in sinks:
            sink.write_step(
                step_metrics(step=3, tflops_per_device=450.0, mfu=0.455, device_memory_bytes=61_200_000_000)
            )
            sink.write_validation(validation(3))
    figures = "loss 3.2500 · lr 1.00e-03 · grad 1.50 · 0.25 s · 16.4k tok/s · 450 TFLOP/s · MFU 45.5%"
    figures += " · 1.00 GB, device 61.20 GB"
    assert caplog.messages == [
        f"step 3/100 · {figures} · ETA -:--:--",
        "validation at step 3: loss 2.5000 · perplexity 12.18 · 512 tokens in 0.1 s",
    ]


def test_writing_a_step_costs_less_than_a_millisecond(tmp_path: Path) -> None:
    """Processor time of the training thread in a fast tenth of the steps, so that other processes do not count."""
    with open_sinks(RunFolder(tmp_path), config(), resumed_step=0) as sinks:
        costs = []
        for step in range(1, 200):
            metrics = step_metrics(step=step)
            start = time.thread_time()
            for sink in sinks:
                sink.write_step(metrics)
            costs.append(time.thread_time() - start)
    assert sorted(costs)[len(costs) // 10] < 1e-3


class _Failing(Sink):
    def __init__(self) -> None:
        self.num_calls = 0

    def write_step(self, metrics: StepMetrics) -> None:
        self.num_calls += 1
        raise ConnectionError("the server is gone")


def test_a_service_that_fails_ends_no_run(caplog: pytest.LogCaptureFixture) -> None:
    service = _Failing()
    sink = InBackground(service)
    for step in range(1, 4):
        sink.write_step(step_metrics(step=step))
    sink.close()
    assert service.num_calls == 1
    assert caplog.messages == ["_Failing failed and gets nothing more in this run: the server is gone"]


class _Stuck(Sink):
    def __init__(self) -> None:
        self.release = threading.Event()

    def write_step(self, metrics: StepMetrics) -> None:
        self.release.wait()


def test_a_service_that_hangs_holds_up_neither_the_steps_nor_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("megatron_7b.training.services.CLOSING_SECONDS", 0.2)
    service = _Stuck()
    sink = InBackground(service)
    start = time.monotonic()
    for step in range(1, 4):
        sink.write_step(step_metrics(step=step))
    sink.close()
    assert time.monotonic() - start < 5
    assert "_Stuck did not end within 0.2 s" in caplog.text
    service.release.set()


def test_wandb_without_its_package_is_refused_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r"pip install 'megatron-7b\[wandb\]'"):
        check_telemetry(TelemetryConfig(wandb=True))
    check_telemetry(TelemetryConfig(wandb=False))


def test_wandb_works_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no key in a .netrc either
    folder = RunFolder(tmp_path / "run")
    folder.root.mkdir()
    for step in (1, 2):  # two starts, one identity
        sink = WeightsAndBiases(wandb, folder, config(wandb=True))
        sink.write_step(step_metrics(step=step))
        sink.close()
    runs = sorted(folder.root.glob("wandb/offline-run-*"))
    assert len({path.name.rsplit("-", 1)[1] for path in runs}) == 1


PROGRESS = """
import dataclasses, sys, time
from pathlib import Path
from megatron_7b.config.schema import RunConfig
from megatron_7b.runtime.process.logs import add_log_file, configure_logging
from megatron_7b.training.report import open_sinks
from megatron_7b.training.run_folder import RunFolder
from tests.training.test_metrics import step_metrics
from tests.training.test_report import config, validation
configure_logging(0)
folder = RunFolder(Path(sys.argv[1]))
add_log_file(folder.log)
with open_sinks(folder, config(tensorboard=False), resumed_step=0) as sinks:
    for step in range(1, 31):
        for sink in sinks:
            sink.write_step(step_metrics(step=step))
            if step == 20:
                sink.write_validation(validation(step))
        time.sleep(0.02)
"""


@pytest.mark.parametrize(("columns", "shown_too"), [("160", "GFLOP/s"), ("100", "16.4k tok/s"), ("60", "16.4k tok/s")])
def test_on_a_terminal_there_is_one_moving_line_and_the_log_has_some_of_them(
    tmp_path: Path, columns: str, shown_too: str
) -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": columns, "LINES": "24"}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRESS, str(tmp_path)], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
    os.close(ours)
    assert process.wait() == 0, shown.decode()
    screen = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert "step 30/100" in screen
    assert shown_too in screen
    assert "loss 3.2500" in screen
    assert "ETA 0:0" in screen
    assert screen.count("validation at step 20") == 1
    assert screen.count("\n") < 20  # a moving line, not thirty of them
    log = RunFolder(tmp_path).log.read_text()
    assert [json.loads(line)["step"] for line in RunFolder(tmp_path).metrics.read_text().splitlines()][:2] == [1, 2]
    assert log.count("step ") == 5  # 1, 10, 20, 30 and the validation
