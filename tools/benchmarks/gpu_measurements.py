"""The measurements of `gpu.py`, each in a process of its own."""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(Path(__file__).resolve().parent)]

from gpu_steps import SHAPES, STEPS, TINY, Shape, Step  # noqa: E402  # after the path is set


class NotHereError(Exception):
    """What a step needs is not there; the message says what.

    Attributes:
        settled: It will not be there in a later call either.
    """

    def __init__(self, message: str, *, settled: bool = True) -> None:
        super().__init__(message)
        self.settled = settled


@dataclass(frozen=True)
class Task:
    """A step to do here.

    Attributes:
        step: The step.
        output: Folder of results.
        device: cuda or cpu.
        is_tiny: With models of a few thousand parameters.
    """

    step: Step
    output: Path
    device: str
    is_tiny: bool

    @property
    def shape(self) -> Shape:
        """The model and batch of the step."""
        return TINY if self.is_tiny else SHAPES[self.step.settings["shape"]]

    @property
    def device_type(self) -> Any:
        """The device, as megatron_7b calls it."""
        return self.device


def environment(task: Task) -> dict[str, Any]:
    """Return what the figures depend on: device, versions, and what large products and copies reach."""
    import torch
    from gpu_training import synchronize

    from megatron_7b.model.kernels import why_no_transformer_engine
    from megatron_7b.runtime.machine.hardware import device_name
    from megatron_7b.runtime.machine.peak_rates import peak_tflops

    facts: dict[str, Any] = {
        "device": device_name(task.device_type),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "commit": _commit(),
        "megatron-core": _version("megatron-core"),
        "transformer-engine": _version("transformer-engine"),
        "no_transformer_engine": why_no_transformer_engine(task.device_type),
        "transformers": _version("transformers"),
        "cores": len(os.sched_getaffinity(0)),
    }
    if task.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        facts |= {
            "memory_bytes": total,
            "free_bytes": free,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "peak_bf16_tflops": peak_tflops(device_name("cuda"), "bf16"),
            "peak_fp8_tflops": peak_tflops(device_name("cuda"), "fp8"),
        }
    size = 8192 if task.device == "cuda" else 512
    a = torch.randn(size, size, dtype=torch.bfloat16, device=task.device)
    seconds = _fastest(lambda: a @ a, lambda: synchronize(task.device))
    facts["product_tflops"] = round(2 * size**3 / seconds / 1e12, 3)
    big = torch.empty(2**30 if task.device == "cuda" else 2**24, dtype=torch.uint8, device=task.device)
    seconds = _fastest(big.clone, lambda: synchronize(task.device))
    facts["copy_gb_per_second"] = round(2 * big.numel() / seconds / 1e9, 1)
    return facts


def _fastest(work: Callable[[], Any], synchronize: Callable[[], None]) -> float:
    """Return the seconds of the fastest of ten, after two others."""
    seconds = []
    for _ in range(12):
        synchronize()
        started = time.perf_counter()
        work()
        synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds[2:])


def _version(distribution: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True)
    return found.stdout.strip() or None


def reference(task: Task) -> dict[str, Any]:
    """Write losses and first gradients in FP32 on the CPU, which needs no GPU."""
    import torch

    from tests.support.gpu_variants import LOCAL_FP32, curve, gradients

    torch.set_num_threads(min(8, len(os.sched_getaffinity(0))))
    losses, first = curve(LOCAL_FP32.config(), "cpu"), gradients(LOCAL_FP32, "cpu")
    torch.save({"curve": losses, "gradients": first}, task.output / "reference.pt")
    return {"num_steps": len(losses), "num_gradients": len(first), "last_loss": losses[-1][0]}


def correctness(task: Task) -> dict[str, Any]:
    """Compare each variant's losses and first gradients with the reference; each has the band of its format."""
    import torch

    from megatron_7b.model.kernels import why_no_transformer_engine
    from tests.support.conditioned_runs import check_curve, check_gradients
    from tests.support.gpu_variants import VARIANTS, curve, gradients

    path = task.output / "reference.pt"
    if not path.exists():
        raise NotHereError("the reference is not there: --only reference makes it, on any machine", settled=False)
    right = torch.load(path, weights_only=True)
    missing, found = why_no_transformer_engine(task.device_type), {}
    for name, variant in VARIANTS.items():
        if variant.impl == "transformer_engine" and missing is not None:
            found[name] = f"not run: no Transformer Engine: {missing}"
            continue
        lines, is_right = [], True
        checks = (
            lambda variant=variant: check_curve(
                curve(variant.config(), task.device), right["curve"], variant.number_format
            ),
            lambda variant=variant: check_gradients(
                gradients(variant, task.device), right["gradients"], variant.number_format
            ),
        )
        for check in checks:
            try:
                lines.append(check())
            except AssertionError as error:
                is_right = False
                lines.append(str(error).splitlines()[0])
        found[name] = f"{'within' if is_right else 'OUTSIDE'} the band; {'; '.join(lines)}"
    return found


def quick_tests(task: Task) -> dict[str, Any]:
    """Run the quick half of tests/gpu; on a CPU it is only collected."""
    words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu_quick", "tests/gpu", "-p", "no:cacheprovider"]
    if task.device == "cpu":
        words.append("--collect-only")
    done = subprocess.run(words, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    last = [line for line in done.stdout.splitlines() if line.strip()][-1].strip("= ")
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return {"summary": last, "failed": failed}


def speed(task: Task) -> dict[str, Any]:
    """Time training steps: ours, or transformers' on the same shape and batch."""
    from gpu_training import time_ours, time_transformers

    from megatron_7b.model.kernels import why_no_transformer_engine

    settings = task.step.settings
    missing = why_no_transformer_engine(task.device_type)
    if settings.get("needs_engine") and missing is not None:
        raise NotHereError(f"no Transformer Engine: {missing}")
    if settings.get("contender") == "transformers":
        return time_transformers(task.shape, task.device_type, is_tiny=task.is_tiny)
    return time_ours(
        task.shape,
        settings.get("options", {}),
        task.device_type,
        is_tiny=task.is_tiny,
        profile=settings.get("profile", False),
    )


def start_up(task: Task) -> dict[str, Any]:
    """Time commands as a user waits for them."""
    from gpu_commands import time_commands

    return time_commands(task.output / "start_up", device=task.device, is_tiny=task.is_tiny)


def decode(task: Task) -> dict[str, Any]:
    """Time generation with random weights."""
    from gpu_commands import time_decoding

    return time_decoding(task.shape, task.device_type, is_tiny=task.is_tiny)


def end_with_input() -> None:
    """Kill this process and all that it starts once its input is closed, as it is when the command has been killed.

    What is left of a step would disturb the next one, and write into its log. What this process starts has no input.
    """
    held = os.dup(sys.stdin.fileno())  # not inherited
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, sys.stdin.fileno())
    os.close(nothing)

    def wait() -> None:
        while os.read(held, 1):
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def main() -> None:
    """Do one step, and print its result as the last line."""
    from gpu import RESULT, SKIPPED

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=[step.name for step in STEPS])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    (step,) = (step for step in STEPS if step.name == given.step)
    if os.getsid(0) == os.getpid():  # not started by hand
        end_with_input()
    try:
        result = globals()[step.work](Task(step, given.output, given.device, given.tiny))
    except NotHereError as reason:
        print(f"{SKIPPED}{json.dumps({'why': str(reason), 'settled': reason.settled})}")
        return
    print(f"{RESULT}{json.dumps(result)}")


if __name__ == "__main__":
    main()
