"""A table of kernels by part, from a trace that torch.profiler has written.

A trace is read event by event, because that of a large model does not fit into memory as objects. On a GPU the kernels
count, copies among them; on a CPU the operators of the thread that trains, each without the operators within it.

Source: the trace event format of Chrome and Perfetto ("JSON Object Format", complete events `ph: X`, times in
microseconds), with the categories of Kineto.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from megatron_7b.runtime.machine.part_clock import STEP_PARTS, STEP_RANGE

_DEVICE_CATEGORIES = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
_HOST_CATEGORIES = frozenset({"cpu_op", "user_annotation"})
_BLOCK = 1 << 20
_GAP = re.compile(r"[\s,]*")

BETWEEN_OPERATORS = "between operators"
"""On a CPU: Python, and waiting that no operator does."""
OTHER = "other"

_RULES = tuple(
    (part, re.compile(pattern, re.IGNORECASE))
    for part, pattern in (
        ("communication", r"nccl|c10d::|gloo|all_?reduce|all_?gather|reduce_?scatter|ModelParallelRegion"),
        ("optimizer", r"adam|sgd|muon|multi_tensor|optimizer|l2_?norm|linalg_vector_norm"),
        ("loss", r"cross_?entropy|log_?softmax|nll_loss"),
        ("attention", r"attention|attn|flash|fmha|sdpa|softmax"),
        ("norm", r"(rms|layer)_?norm|norm_(fwd|bwd|forward|backward)|\bln_(fwd|bwd)"),
        ("rotary embedding", r"rope|rotary|rotation"),
        ("activation", r"swiglu|silu|gelu|relu|triton_poi"),
        ("matrix products", r"gemm|nvjet|cutlass|cublas|xmma|matmul|\b(add|b|badd)?b?mm\b|linear|wgrad|dgrad|split_?k"),
        ("embedding", r"embedding|index|gather|scatter"),
        ("copies", r"memcpy|memset|copy|fill|zero|\bcat\b|CatArray|clone|contiguous|transpose|cast|\bto\b"),
        ("element-wise", r"elementwise|::(add|sub|mul|div|neg|pow|exp|log|sqrt|sum|mean|where|sigmoid)_?\b|reduce"),
    )
)
"""Parts by what is in the name of a kernel or operator; the first that fits decides."""


@cache
def part_of_kernel(name: str) -> str:
    """Return the part that a kernel or an operator is of, as its name tells."""
    if name in ("communication", "data"):  # ranges of `PartClock`: what no operator within them has done
        return name
    if name in (*STEP_PARTS, STEP_RANGE):
        return BETWEEN_OPERATORS
    return next((part for part, pattern in _RULES if pattern.search(name)), OTHER)


@dataclass(frozen=True)
class Kernel:
    """All runs of one kernel or operator.

    Attributes:
        name: As the trace has it.
        part: What it is part of.
        seconds: In all.
        count: How often it ran.
    """

    name: str
    part: str
    seconds: float
    count: int


@dataclass(frozen=True)
class KernelTable:
    """What the steps of a trace consist of.

    Attributes:
        is_of_device: Whether a GPU's kernels are counted, or else a CPU's operators.
        num_steps: How many steps there are in the trace.
        seconds: From their beginning to their end, what came between them left out.
        busy_seconds: In which the GPU does something; on a CPU, in which operators run.
        kernels: Those that took longest first.
    """

    is_of_device: bool
    num_steps: int
    seconds: float
    busy_seconds: float
    kernels: tuple[Kernel, ...]

    @property
    def parts(self) -> list[Kernel]:
        """The sums of the parts, the longest first."""
        sums: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
        for kernel in self.kernels:
            seconds, count = sums[kernel.part]
            sums[kernel.part] = seconds + kernel.seconds, count + kernel.count
        found = [Kernel(part, part, seconds, count) for part, (seconds, count) in sums.items()]
        return sorted(found, key=lambda part: -part.seconds)

    def to_dict(self, *, num_kernels: int = 50) -> dict[str, Any]:
        """Return the table for JSON: seconds and counts are per step."""
        return {
            "device": "cuda" if self.is_of_device else "cpu",
            "steps": self.num_steps,
            "step_seconds": self.seconds / self.num_steps,
            "busy_seconds": self.busy_seconds / self.num_steps,
            "parts": [self._row(part) for part in self.parts],
            "kernels": [self._row(kernel) | {"name": kernel.name} for kernel in self.kernels[:num_kernels]],
        }

    def _row(self, kernel: Kernel) -> dict[str, Any]:
        return {
            "part": kernel.part,
            "seconds": kernel.seconds / self.num_steps,
            "share": kernel.seconds / self._whole,
            "count": kernel.count / self.num_steps,
        }

    @property
    def _whole(self) -> float:
        return sum(kernel.seconds for kernel in self.kernels) or 1.0

    def to_text(self, title: str, *, num_kernels: int = 20) -> str:
        """Return the table as text, with the kernels that take longest under it."""
        doing = "the GPU works" if self.is_of_device else "operators run"
        busy = f"{1e3 * self.busy_seconds / self.num_steps:.1f} ms ({self.busy_seconds / (self.seconds or 1.0):.1%})"
        lines = [title, f"{1e3 * self.seconds / self.num_steps:.1f} ms per step; {doing} in {busy} of them", ""]
        lines += [_line(("ms per step", "share", "per step", "part"))]
        lines += [_line(self._cells(part, part.part)) for part in self.parts]
        lines += ["", _line(("ms per step", "share", "per step", "kernel" if self.is_of_device else "operator"))]
        lines += [_line(self._cells(one, f"{one.name[:110]}  [{one.part}]")) for one in self.kernels[:num_kernels]]
        return "\n".join(lines) + "\n"

    def _cells(self, kernel: Kernel, name: str) -> tuple[str, str, str, str]:
        row = self._row(kernel)
        return f"{1e3 * row['seconds']:.3f}", f"{row['share']:.1%}", f"{row['count']:.10g}", name


def _line(cells: tuple[str, str, str, str]) -> str:
    time, share, count, name = cells
    return f"{time:>12} {share:>7} {count:>9}  {name}"


def tabulate(events: Iterable[Mapping[str, Any]]) -> KernelTable:
    """Return the table of a trace's events.

    Args:
        events: Those of the list `traceEvents`, in any order; steps are the ranges that `PartClock` writes.

    Raises:
        ValueError: There is no step among them.
    """
    steps: list[tuple[float, float]] = []
    of_threads: dict[Any, list[tuple[float, float, str]]] = defaultdict(list)
    of_device: list[tuple[float, float, str]] = []
    training_thread = None
    for event in events:
        category = event.get("cat")
        if event.get("ph") != "X" or (category not in _DEVICE_CATEGORIES and category not in _HOST_CATEGORIES):
            continue
        begin, length = float(event["ts"]), float(event["dur"])
        span = begin, begin + length, str(event["name"])
        if category in _DEVICE_CATEGORIES:
            of_device.append(span)
            continue
        of_threads[event["tid"]].append(span)
        if span[2] == STEP_RANGE:
            training_thread = event["tid"]
            steps.append(span[:2])
    if not steps:
        raise ValueError("the trace has no step")
    if of_device:
        return _table(of_device, steps, busy=_covered(of_device), is_of_device=True)
    own = _without_inner([span for span in of_threads[training_thread] if _is_within(span, steps)])
    operators = sum(end - begin for begin, end, name in own if part_of_kernel(name) != BETWEEN_OPERATORS)
    return _table(own, steps, busy=operators, is_of_device=False)


def _table(
    spans: list[tuple[float, float, str]], steps: list[tuple[float, float]], *, busy: float, is_of_device: bool
) -> KernelTable:
    sums: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for begin, end, name in spans:
        seconds, count = sums[name]
        sums[name] = seconds + (end - begin) / 1e6, count + 1
    kernels = [Kernel(name, part_of_kernel(name), seconds, count) for name, (seconds, count) in sums.items()]
    return KernelTable(
        is_of_device=is_of_device,
        num_steps=len(steps),
        seconds=sum(end - begin for begin, end in steps) / 1e6,
        busy_seconds=busy / 1e6,
        kernels=tuple(sorted(kernels, key=lambda kernel: -kernel.seconds)),
    )


def _is_within(span: tuple[float, float, str], steps: list[tuple[float, float]]) -> bool:
    return any(begin <= span[0] and span[1] <= end for begin, end in steps)


def _without_inner(spans: list[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Return spans of one thread, each as long as no other runs within it."""
    outer: list[list[Any]] = []  # of those that have not ended: end, index
    lengths = []
    spans = sorted(spans, key=lambda span: (span[0], -span[1]))
    for index, (begin, end, _) in enumerate(spans):
        while outer and outer[-1][0] <= begin:
            outer.pop()
        lengths.append(end - begin)
        if outer:
            lengths[outer[-1][1]] -= end - begin
        outer.append([end, index])
    return [(0.0, max(0.0, length), name) for length, (_, _, name) in zip(lengths, spans, strict=True)]


def _covered(spans: list[tuple[float, float, str]]) -> float:
    """Return in how much time any of the spans runs; those of several streams overlap."""
    covered, until = 0.0, float("-inf")
    for begin, end, _ in sorted(spans):
        covered += max(0.0, end - max(begin, until))
        until = max(until, end)
    return covered


def read_trace(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the events of an uncompressed trace, one after the other.

    Raises:
        ValueError: It is not a trace.
    """
    decoder, key = json.JSONDecoder(), '"traceEvents"'
    with path.open(encoding="utf-8", errors="replace") as file:
        text = file.read(_BLOCK)
        while key not in text or "[" not in text[text.index(key) :]:
            block = file.read(_BLOCK)
            if not block:
                raise ValueError(f"{path} is no trace: it has no list {key}")
            text += block
        place = text.index("[", text.index(key)) + 1
        while True:
            gap = _GAP.match(text, place)
            place = gap.end() if gap else place
            if text[place : place + 1] == "]":
                return
            try:
                event, place = decoder.raw_decode(text, place)
            except json.JSONDecodeError:  # it continues in the next block
                block = file.read(_BLOCK)
                if not block:
                    raise ValueError(f"{path} is cut short") from None
                text, place = text[place:] + block, 0
            else:
                yield event
