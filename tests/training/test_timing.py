"""The parts of a step: that they add up, that megatron-core's timers are all known, and that slow ranks are named."""

import functools
import importlib.util
import re
import time
from pathlib import Path
from typing import ClassVar

import pytest

from megatron_7b import training
from megatron_7b.config.schema import RunConfig
from megatron_7b.conversion import import_from_hugging_face
from megatron_7b.runtime.machine.part_clock import PartClock, part_of
from megatron_7b.training.hooks import Hook
from megatron_7b.training.metrics import StepMetrics
from megatron_7b.training.run import Run
from megatron_7b.training.timing import Place, combine, find_slowest
from tests.conversion.tiny_models import save_tiny_model
from tests.support.ranks import run_ranks
from tests.training import runs

SECONDS_ASLEEP = 0.05  # in each layer, of two; nothing else in these steps takes a tenth of it


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, which only the test moves."""
    moment = [100.0]
    monkeypatch.setattr("megatron_7b.runtime.machine.part_clock.time.perf_counter", lambda: moment[0])
    return moment


def test_time_counts_for_the_innermost_part_and_nothing_is_lost(now: list[float]) -> None:
    clock = PartClock("cpu")
    timer = clock("forward-compute", log_level=2)
    timer.start()  # outside of a step: not counted
    now[0] += 1000
    timer.stop()
    with clock.step():
        now[0] += 1  # other
        with clock.part("communication"):
            now[0] += 2
            with clock.part("data"):
                now[0] += 4
            now[0] += 8
        clock("forward-backward", log_level=1).start(barrier=True)
        clock("forward-compute", log_level=2).start()
        now[0] += 16
        clock("forward-compute").stop()
        clock("forward-backward").stop()
    now[0] += 1000
    with clock.between_steps("saving"), clock.part("communication"):
        now[0] += 32
    expected = {"other": 1.0, "communication": 10.0, "data": 4.0, "forward": 16.0, "saving": 32.0}
    assert clock.take() == (1, expected)
    assert clock.take() == (0, {})


def test_a_step_that_fails_leaves_nothing_behind(now: list[float]) -> None:
    clock = PartClock("cpu")

    def fail() -> None:
        with clock.step():
            clock("backward-compute").start()
            now[0] += 1
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with clock.step():
        now[0] += 1
    assert clock.take() == (1, {"backward": 1.0, "other": 1.0})


class _Event:
    """Stands for an event of a GPU: it happens when the GPU gets there, which is later than it is recorded."""

    waiting: ClassVar[list["_Event"]] = []
    num_made = 0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        _Event.num_made += 1

    def record(self) -> None:
        self.time: float | None = None
        _Event.waiting.append(self)

    def query(self) -> bool:
        return self.time is not None

    def elapsed_time(self, end: "_Event") -> float:
        assert self.time is not None
        assert end.time is not None
        return (end.time - self.time) * 1e3

    def synchronize(self) -> None:
        assert self.time is not None, "nothing may wait for the device within a step"


def test_on_a_gpu_events_are_read_once_they_have_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in for the device: what only a real one shows is in tests/gpu."""
    monkeypatch.setattr("torch.cuda.Event", _Event)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)
    clock, device_time = PartClock("cuda"), [0.0]

    def device_works(*seconds: float) -> None:
        for took in seconds:
            device_time[0] += took
            _Event.waiting.pop(0).time = device_time[0]

    for _ in range(4):
        with clock.step(), clock.part("forward"):
            pass
        device_works(0.0, 1.0, 2.0)  # it reaches the end of the step only after the next one has begun
        if _ == 1:
            made_for_two_steps = _Event.num_made
        with clock.between_steps("saving"):
            pass
        device_works(4.0, 8.0, 16.0)
    num_steps, seconds = clock.take()
    assert (num_steps, seconds) == (4, {"other": 4 * 5.0, "forward": 4 * 2.0, "saving": 4 * 16.0})
    assert _Event.num_made <= made_for_two_steps + 2


def test_every_timer_of_megatron_core_that_waits_for_others_is_communication() -> None:
    spec = importlib.util.find_spec("megatron.core")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    names = {
        name
        for part in ("pipeline_parallel", "distributed", "optimizer")
        for path in (folder / part).rglob("*.py")
        for name in re.findall(r"timers\(\s*'([\w-]+)'", path.read_text())
    }
    assert len(names) > 15
    own_work = {name for name in names if part_of(name) != "communication"}
    assert {name: part_of(name) for name in own_work if part_of(name)} == {
        "forward-compute": "forward",
        "backward-compute": "backward",
    }
    assert all(name == "forward-backward" or name.startswith("optimizer-") for name in own_work if not part_of(name))


def test_the_slowest_rank_is_found_among_those_of_its_stage() -> None:
    places = [Place(f"node{rank // 2}", 1 + rank // 4) for rank in range(8)]
    slowest = find_slowest([1, 1, 1, 1, 3, 3, 3, 3.6], places)  # the second stage has more to do, all of it
    assert slowest is not None
    assert str(slowest) == "rank 7 (node3) works 20% longer than the others"
    stages = find_slowest([1.0, 3.5], [Place("a", 1), Place("b", 2)])
    assert str(stages) == "stage 2 (rank 1, b) works 3.5 times as long as the others"
    assert find_slowest([1.0], [Place("a", 1)]) is None


def test_waiting_is_no_work() -> None:
    timing = combine(
        2,
        [[0.0] * 4 + [8.0, 2.0, 6.0, 0.0, 0.0, 0.0, 0.0], [0.0] * 4 + [0.0, 10.0, 6.0, 0.0, 0.0, 4.0, 0.0]],
        [Place("a", 1)] * 2,
    )
    assert timing.values == {
        "timed_steps": 2,
        "communication_seconds": 2.0, "communication_seconds_min": 0.0, "communication_seconds_max": 4.0,
        "optimizer_seconds": 3.0, "optimizer_seconds_min": 1.0, "optimizer_seconds_max": 5.0,
        "other_seconds": 3.0, "other_seconds_min": 3.0, "other_seconds_max": 3.0,
        "saving_seconds": 2.0, "saving_seconds_min": 0.0, "saving_seconds_max": 4.0,
        "slowest_rank": 1, "slowest_by": 4.0,
    }  # fmt: skip
    assert timing.step_seconds == 8.0
    assert timing.shares == "optimizer 38%, other 38%, communication 25%"


def pretrain_with_a_slow_rank(config: RunConfig, run_dir: Path, rank: int) -> tuple[int | None, str]:
    """As `runs.pretrain`, but one rank sleeps in each of its layers."""
    import torch.distributed as dist
    from megatron.core.transformer.mlp import MLP

    forward = MLP.forward

    @functools.wraps(forward)
    def sleep(*args: object, **kwargs: object) -> object:
        time.sleep(SECONDS_ASLEEP)
        return forward(*args, **kwargs)

    if dist.get_rank() == rank:
        MLP.forward = sleep
    return runs.pretrain(config, run_dir)


class Napping(Hook):
    """Sleeps after each step on one rank."""

    def after_step(self, run: Run, metrics: StepMetrics) -> None:
        if run.ranks.rank == 1:
            time.sleep(4 * SECONDS_ASLEEP)


def pretrain_with_a_slow_hook(config: RunConfig, run_dir: Path) -> int:
    return training.pretrain(config, run_dir, hooks=[Napping()])


def test_a_rank_whose_hooks_take_long_is_named(tmp_path: Path) -> None:
    """The others wait for it in the next step; in its own steps it is as fast as they are."""
    config = runs.config(
        runs.write_corpus(tmp_path),
        training={"train_steps": 5, "eval_interval_steps": 0},
        telemetry={"log_interval_steps": 4},
    )
    assert run_ranks(2, pretrain_with_a_slow_hook, config, tmp_path / "run") == [0, 0]
    (line,) = [line for line in runs.steps(tmp_path / "run") if line["step"] == 4]
    assert line["hooks_seconds_max"] > 3 * 4 * SECONDS_ASLEEP > line["hooks_seconds_min"]
    assert line["slowest_rank"] == 1
    assert " · rank 1 (" in (tmp_path / "run" / "train.log").read_text()


def write_teacher(folder: Path) -> str:
    save_tiny_model("llama", folder / "teacher_hf", vocab_size=runs.VOCAB_SIZE, num_hidden_layers=2)
    import_from_hugging_face(folder / "teacher_hf", folder / "teacher")
    return str(folder / "teacher")


@pytest.mark.parametrize(
    ("parallel", "rank", "named", "asleep", "is_taught"),
    [
        ({"use_distributed_optimizer": True}, 1, "rank 1 (", 4 * SECONDS_ASLEEP, False),
        ({"pipeline_model_parallel_size": 2}, 0, "stage 1 (rank 0, ", 4 * SECONDS_ASLEEP, True),
    ],
)
def test_a_slow_rank_is_named_and_the_others_are_seen_to_wait(
    parallel: dict[str, object], rank: int, named: str, asleep: float, is_taught: bool, tmp_path: Path
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = runs.config(
        runs.write_corpus(tmp_path),
        parallel=parallel,
        training={"train_steps": 5, "eval_interval_steps": 0},
        checkpoint={"save_interval_steps": 2},
        telemetry={"log_interval_steps": 4, "tensorboard": True},
        distillation={"teacher": write_teacher(tmp_path)} if is_taught else {},
    )
    run_dir = tmp_path / "run"
    assert run_ranks(2, pretrain_with_a_slow_rank, config, run_dir, rank) == [(0, ""), (0, "")]
    reports = {line["step"]: line for line in runs.steps(run_dir) if "timed_steps" in line}
    assert {step: line["timed_steps"] for step, line in reports.items()} == {1: 1, 4: 3, 5: 1}
    line = reports[4]
    assert line["slowest_rank"] == rank
    assert line["slowest_host"]
    assert line["parameters_bytes"] == reports[1]["parameters_bytes"] > 0
    assert ("predicted_parameters_bytes" in line, "predicted_parameters_bytes" in reports[1]) == (False, True)
    assert line["forward_seconds_max"] > asleep > line["forward_seconds_min"]
    assert line["communication_seconds_max"] > asleep / 2
    if is_taught:  # the second stage waits for the teacher's states as well
        assert line["teacher_seconds_max"] > asleep > line["teacher_seconds_min"]
    assert line["saving_seconds"] > 0
    parts = ("data", *(("teacher",) if is_taught else ()), "forward", "backward", "communication", "optimizer", "other")
    measured = sum(one["step_seconds"] for one in runs.steps(run_dir) if 2 <= one["step"] <= 4) / 3
    # Roughly: the one is of all ranks, the other of the main rank, and either may wait at the end of a step.
    assert sum(line[f"{name}_seconds"] for name in parts) == pytest.approx(measured, rel=0.5)
    (logged,) = [one for one in (run_dir / "train.log").read_text().splitlines() if "step 4/5" in one]
    assert re.search(r" s \(\w+ \d+%, ", logged)
    assert f" · {named}" in logged
    events = accumulator.EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    (value,) = [one.value for one in events.Scalars("time/forward_seconds") if one.step == 4]
    assert value == pytest.approx(line["forward_seconds"])
