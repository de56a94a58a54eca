"""`tools/benchmarks/gpu.py` where there is no GPU: its steps on tiny models, what it keeps, skips and reports."""

import contextlib
import importlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.assets import REPOSITORY

FOLDER = REPOSITORY / "tools" / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def beside_the_benchmarks() -> Any:
    before = list(sys.path)
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path[:] = before


def load(name: str) -> ModuleType:
    return importlib.import_module(name)


def tiny(tmp_path: Path, *arguments: str) -> None:
    load("gpu").main(["--device", "cpu", "--tiny", "--output", str(tmp_path), *arguments])


def test_a_step_is_measured_once_and_what_had_no_time_is_done_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny(tmp_path, "--only", "environment", "llama_fp8", "--budget", "0")
    assert "takes about 25 s, 0 s were left" in capsys.readouterr().out
    tiny(tmp_path, "--only", "environment", "llama_fp8")
    first = capsys.readouterr()
    assert "environment: device, versions" in first.err
    assert "| `llama_fp8` | skipped | no Transformer Engine: it needs a GPU |" in first.out
    assert "A large BF16 product reaches 0." in first.out
    kept = (tmp_path / "environment.json").read_bytes()
    tiny(tmp_path, "--only", "environment", "llama_fp8")
    again = capsys.readouterr()
    assert again.err.count("there already") == 2
    assert (tmp_path / "environment.json").read_bytes() == kept
    assert again.out == first.out
    with pytest.raises(SystemExit, match="give another --output"):
        load("gpu").check_folder(tmp_path, {"device": "cuda", "tiny": False})


def run(code: str, tmp_path: Path, limit: float = 30.0) -> dict[str, Any]:
    """Run a step whose process is this Python code."""
    (step, *_) = load("gpu_steps").STEPS
    result: dict[str, Any] = load("gpu").run_step(step, tmp_path, [sys.executable, "-c", code], limit)
    return result


def test_what_came_of_a_process(tmp_path: Path) -> None:
    assert run("print('noise'); print('RESULT {\"a\": 1}')", tmp_path)["result"] == {"a": 1}
    skipped = run('print(\'SKIPPED {"why": "none", "settled": false}\')', tmp_path)
    assert (skipped["status"], skipped["why"]) == ("skipped", "none")
    assert not load("gpu").is_settled(skipped)
    failed = run("raise ValueError('nothing fits')", tmp_path)
    assert (failed["status"], failed["why"]) == ("failed", "exit code 1: ValueError: nothing fits")
    assert run("print('RESULT {}'); raise SystemExit(3)", tmp_path)["status"] == "failed"


def test_a_step_that_takes_too_long_ends_with_all_that_it_started(tmp_path: Path) -> None:
    late = tmp_path / "late"
    child = f"import time; time.sleep(3); open({str(late)!r}, 'w')"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    assert run(code, tmp_path, limit=1.0)["why"] == "took more than 1 s"
    time.sleep(3.5)
    assert not late.exists()


def command_lines() -> Iterator[bytes]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            yield path.read_bytes()


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_a_step_ends_with_the_command(ending: signal.Signals, tmp_path: Path) -> None:
    """However it ends: what would be left of a step disturbs the same one in the next call."""
    words = [sys.executable, str(FOLDER / "gpu.py"), "--device", "cpu", "--tiny", "--output", str(tmp_path)]
    command = subprocess.Popen([*words, "--only", "environment"], stderr=subprocess.PIPE, text=True)
    assert command.stderr is not None
    assert "environment: device" in command.stderr.readline()
    time.sleep(0.3)
    command.send_signal(ending)
    command.wait(20)
    deadline = time.monotonic() + 120
    while left := [line for line in command_lines() if f"environment\0--output\0{tmp_path}".encode() in line]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    assert "RESULT" not in (tmp_path / "environment.log").read_text()  # it has not come to its end


def test_what_failed_is_tried_after_everything_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu, steps = load("gpu"), load("gpu_steps").STEPS[:2]
    (tmp_path / f"{steps[0].name}.json").write_text(json.dumps({"status": "failed", "why": "broken"}))
    gpu.work(steps, tmp_path, 0.0, [])
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"1/2 {steps[1].name}", f"2/2 {steps[0].name}"]
    (tmp_path / f"{steps[0].name}.json").write_text("{")  # cut short by another program
    assert gpu.read_result(tmp_path, steps[0]) is None


def test_kernels_are_told_apart_by_their_names() -> None:
    training = load("gpu_training")
    for name, part in (
        ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NNT", "matrix products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma", "attention, backward"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma", "attention"),
    ):
        assert training.part_of(name) == part, name
    assert training.covered([(0.0, 2.0), (1.0, 3.0), (5.0, 6.0)]) == 4.0


def test_a_page_without_results_says_so_and_has_the_goals() -> None:
    page = load("gpu_table").table({})
    assert page.count("not measured yet") >= len(load("gpu_table").GOALS)
    assert "| 22,000 | 19,194 (LLMQ, H100) |" in page


def test_estimates_and_limits_are_listed_without_running(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load("gpu").main(["--dry-run", "--output", str(tmp_path / "none")])
    assert "To do: about" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()
    with pytest.raises(SystemExit, match="no step nonsense; there are environment, reference"):
        load("gpu").main(["--only", "nonsense"])


@pytest.mark.slow
def test_steps_of_each_kind_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = ("environment", "reference", "correctness", "llama_bf16", "llama_fp8")  # all take ten minutes
    tiny(tmp_path, "--budget", "2000", "--only", *steps)
    results = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json") if path.stem != "settings"}
    assert set(steps) <= set(results)
    unmeasured = {name: result["why"] for name, result in results.items() if result["status"] != "measured"}
    assert all("Transformer Engine" in why for why in unmeasured.values()), unmeasured
    memory, layers = (results["llama_bf16"]["result"][name] for name in ("memory", "num_layers"))
    assert (memory["gradients"], layers) == (2 * memory["parameters"], 2)  # FP32 beside BF16
    assert all("OUTSIDE" not in outcome for outcome in results["correctness"]["result"].values())
    assert "Tiny models" in capsys.readouterr().out
