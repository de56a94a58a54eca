#!/usr/bin/env python3
"""Everything that is measured on one GPU, in one command that continues where it stopped.

    python tools/benchmarks/gpu.py                                # eight minutes of an H100; again: the rest
    python tools/benchmarks/gpu.py --write docs/benchmarks/gpu.md # ... and the dated table into a page
    python tools/benchmarks/gpu.py --dry-run                      # the steps, and how long each takes
    python tools/benchmarks/gpu.py --device cpu --tiny            # every step that a CPU can do, on tiny models

Each step runs in a process of its own, within a time limit of its own, and leaves OUTPUT/STEP.json, which appears whole
or not at all, and OUTPUT/STEP.log. A later call with the same OUTPUT keeps what was measured and does what is missing:
what there was no time for, and what failed. `--only reference` can be done on another machine: it needs no GPU.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(Path(__file__).resolve().parent)]

from gpu_steps import STEPS, Step  # noqa: E402  # after the path is set, for a checkout without an install
from gpu_table import table  # noqa: E402

from megatron_7b.files import replace_text  # noqa: E402

RESULT, SKIPPED = "RESULT ", "SKIPPED "
"""Beginnings of the last line of a step's process, before JSON: what it measured, or why it could not."""


def say(message: str) -> None:
    """Tell what is being done, on stderr: stdout has the table alone."""
    print(message, file=sys.stderr, flush=True)


def read_result(output: Path, step: Step) -> dict[str, Any] | None:
    """Return what a folder has of a step; None: nothing, or nothing that can be read."""
    try:
        found: dict[str, Any] = json.loads((output / f"{step.name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def is_settled(result: dict[str, Any] | None) -> bool:
    """Return whether another call would find nothing else: measured, or skipped for what this machine lacks."""
    return result is not None and (result["status"] == "measured" or result.get("settled", False))


def run_step(step: Step, output: Path, words: Sequence[str], limit: float) -> dict[str, Any]:
    """Run a step in a process of its own; returns its result.

    Args:
        step: What to do.
        output: Where its log goes.
        words: The command that does it.
        limit: Seconds after which it is ended.
    """
    log, started = output / f"{step.name}.log", time.monotonic()
    with log.open("w", encoding="utf-8") as stream:
        # A session of its own, so that what the step has started ends with it. Its input closes when this process ends,
        # even if that is killed: `end_with_input` of gpu_measurements.
        process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
            cwd=REPOSITORY,
        )  # fmt: skip
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    result = {"step": step.name, "seconds": round(time.monotonic() - started, 1)}
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    found = [line for line in lines if line.startswith((RESULT, SKIPPED))]
    if code == 0 and found and found[-1].startswith(RESULT):
        return {**result, "status": "measured", "result": json.loads(found[-1].removeprefix(RESULT))}
    if code == 0 and found:
        return {**result, "status": "skipped", **json.loads(found[-1].removeprefix(SKIPPED))}
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    why = f"took more than {limit:.0f} s" if code is None else f"exit code {code}: {last[:300]}"
    return {**result, "status": "failed", "why": why}


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Kill whatever is left of a step's processes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdin is not None
    process.stdin.close()


def work(steps: Sequence[Step], output: Path, budget: float, flags: Sequence[str]) -> None:
    """Do what is missing of the steps while there is time; each leaves a result, if only why there is no other.

    Args:
        steps: In the order of their importance.
        output: Folder of results.
        budget: Seconds for all of them.
        flags: For the processes: the device, and how large the models are.
    """
    end, is_tiny = time.monotonic() + budget, "--tiny" in flags
    has_failed = {step.name: (read_result(output, step) or {}).get("status") == "failed" for step in steps}
    steps = sorted(steps, key=lambda step: has_failed[step.name])  # what failed must not keep others from their turn
    for number, step in enumerate(steps, 1):
        if is_settled(read_result(output, step)):
            say(f"{number}/{len(steps)} {step.name}: there already")
            continue
        left, needed = end - time.monotonic(), step.estimate(is_tiny=is_tiny)
        if left < needed:
            result = {
                "step": step.name,
                "status": "skipped",
                "why": f"takes about {needed} s, {max(left, 0):.0f} s were left",
            }
        else:
            say(f"{number}/{len(steps)} {step.name}: {step.what} (about {needed} s, {left:.0f} s left)")
            words = [
                sys.executable,
                str(Path(__file__).with_name("gpu_measurements.py")),
                step.name,
                "--output",
                str(output),
            ]
            result = run_step(step, output, [*words, *flags], min(step.limit(is_tiny=is_tiny), left + 10))
        replace_text(output / f"{step.name}.json", json.dumps(result, indent=1) + "\n")
        what_came = f": {result['why']}" if "why" in result else f" in {result['seconds']} s"
        say(f"{number}/{len(steps)} {step.name}: {result['status']}{what_came}")


def check_folder(output: Path, settings: dict[str, object]) -> None:
    """Let a folder have results of one kind only.

    Raises:
        SystemExit: It has others.
    """
    output.mkdir(parents=True, exist_ok=True)
    record = output / "settings.json"
    if record.exists() and (found := json.loads(record.read_text(encoding="utf-8"))) != settings:
        raise SystemExit(f"{output} has results of {found}, not of {settings}: give another --output, or delete it")
    replace_text(record, json.dumps(settings) + "\n")


def dry_run(steps: Sequence[Step], output: Path, *, is_tiny: bool) -> str:
    """Return the steps with their times as a Markdown table; nothing runs."""
    lines = ["| step | about | at most | state | what |", "|---|---|---|---|---|"]
    total = 0
    for step in steps:
        result = read_result(output, step)
        state = result["status"] if result else "to do"
        seconds = step.estimate(is_tiny=is_tiny)
        total += 0 if is_settled(result) else seconds
        lines.append(f"| {step.name} | {seconds} s | {step.limit(is_tiny=is_tiny)} s | {state} | {step.what} |")
    return "\n".join([*lines, "", f"To do: about {total} s."])


def choose(names: Sequence[str] | None) -> list[Step]:
    """Return the steps of these names, in their order; None: all.

    Raises:
        SystemExit: There is no step of a name.
    """
    unknown = sorted(set(names or ()) - {step.name for step in STEPS})
    if unknown:
        raise SystemExit(f"no step {', '.join(unknown)}; there are {', '.join(step.name for step in STEPS)}")
    return [step for step in STEPS if names is None or step.name in names]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu_results"), help="folder of results (gpu_results)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="models of a few thousand parameters: a test of the steps")
    parser.add_argument("--budget", type=float, default=470.0, help="seconds for this call (470)")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps")
    parser.add_argument("--dry-run", action="store_true", help="list the steps, run none")
    parser.add_argument("--write", type=Path, help="also write the table to this file")
    given = parser.parse_args(arguments)
    steps = choose(given.only)
    if given.dry_run:
        print(dry_run(steps, given.output, is_tiny=given.tiny))
        return
    if given.device == "cpu" and not given.tiny:
        raise SystemExit("--device cpu goes with --tiny: models of 7B take hours on a CPU")
    needs_gpu = given.device == "cuda" and any(step.name != "reference" for step in steps)
    if needs_gpu and not _has_gpu():
        raise SystemExit("torch sees no GPU: --dry-run lists the steps, --device cpu --tiny tries them on tiny models")
    signal.signal(signal.SIGTERM, _leave)
    check_folder(given.output, {"device": given.device, "tiny": given.tiny})
    work(steps, given.output.resolve(), given.budget, ["--device", given.device, *(["--tiny"] if given.tiny else [])])
    page = table({step.name: read_result(given.output, step) for step in STEPS}, is_tiny=given.tiny)
    print(page)
    if given.write:
        replace_text(given.write, page)


def _leave(number: int, _frame: object) -> None:
    """End as after an interrupt, so that the step that is running ends as well."""
    sys.exit(128 + number)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    main()
