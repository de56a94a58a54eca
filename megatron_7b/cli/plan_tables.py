"""Plans as text: a table of layouts, then what the first of them consists of, and how to run it."""

import shlex
from collections.abc import Iterator, Sequence

from megatron_7b.cli.tables import align
from megatron_7b.config import RunConfig
from megatron_7b.model.sizes import count_parameters
from megatron_7b.page_parts import format_figure
from megatron_7b.planning import Advice, Candidate, Plan
from megatron_7b.planning.scaling import ScalingRow

OWN_FLAGS = frozenset(
    f"--{name}"
    for name in ("gpus", "gpu", "gpus-per-node", "gpu-memory", "link", "network", "top", "page", "scaling", "json")
)
"""Flags of `plan` that a run does not have."""
_LONG_STEP = 10.0
"""Seconds from which on the parts of a step are given in seconds, no longer in milliseconds."""
_HEADS = (
    "",
    "layout",
    "micro × steps",
    "recompute, formats",
    "GB/GPU",
    "s/step",
    "tokens/s/GPU",
    "TFLOP/s",
    "of peak",
    "limit",
)


def print_plan(found: Plan, advice: Sequence[Advice], argv: Sequence[str]) -> None:
    """Print a plan.

    Args:
        found: What was found.
        advice: What would fit, if nothing does.
        argv: The command's arguments, to repeat those that a run takes as well.
    """
    print("\n".join(_lines(found, advice, argv)))


def _lines(found: Plan, advice: Sequence[Advice], argv: Sequence[str]) -> Iterator[str]:
    config, device = found.config, found.device
    training = config.training
    yield (
        f"{count_parameters(config.model) / 1e9:.2f} B parameters, {training.global_batch_size} × "
        f"{config.data.seq_length} tokens a step, on {found.world_size} × {device.title} "
        f"({device.memory_bytes / 1e9:.1f} GB)"
    )
    yield ""
    rows = [list(_HEADS)]
    rows += [_row("as configured", found.configured)] if found.configured is not None else []
    rows += [_row(str(number), candidate) for number, candidate in enumerate(found.candidates, start=1)]
    yield from align(rows, num_left=4)
    first = found.candidates[0]
    yield ""
    yield f"memory of 1:  {_parts(first.memory.as_dict(), 1e9, 'GB')}"
    in_seconds = first.time.total >= _LONG_STEP
    yield f"time of 1:    {_parts(first.time.as_dict(), *((1.0, 's') if in_seconds else (1e-3, 'ms')))}"
    yield ""
    if found.fits:
        yield shlex.join(run_words(found, argv))
        return
    yield "No layout fits. " + ("These would:" if advice else "Nothing that was tried would change that.")
    for one in advice:
        candidate = one.candidate
        yield (
            f"  {one.change} → {', '.join((candidate.name, *candidate.details))}, "
            f"{candidate.memory.total / 1e9:.1f} GB, {candidate.tokens_per_second_per_gpu:,.0f} tokens/s/GPU"
        )


def _row(name: str, candidate: Candidate) -> list[str]:
    return [
        name,
        candidate.name,
        f"{candidate.config.training.micro_batch_size} × {candidate.num_microbatches}",
        ", ".join(filter(None, (candidate.recompute, candidate.formats))),
        f"{candidate.memory.total / 1e9:.1f}{'' if candidate.fits else ' !'}",
        format_figure(candidate.time.total),
        f"{candidate.tokens_per_second_per_gpu:,.0f}",
        format_figure(candidate.tflops_per_gpu),
        f"{100 * candidate.mfu:.1f} %",
        candidate.limit,
    ]


def _parts(values: dict[str, float] | dict[str, int], unit: float, name: str) -> str:
    """Return the parts that count, the largest first."""
    parts = sorted(((part, value) for part, value in values.items() if part != "total"), key=lambda one: -one[1])
    return (
        ", ".join(
            f"{part.replace('_', ' ')} {value / unit:,.1f}" for part, value in parts if value > 0.002 * values["total"]
        )
        + f"; {values['total'] / unit:,.1f} {name}"
    )


def run_words(found: Plan, argv: Sequence[str]) -> Iterator[str]:
    """Yield the command that runs the first choice: arguments of the plan that a run has too, and what was chosen."""
    is_own = False
    yield from ("megatron-7b", run_command(found.config))
    for word in argv:
        if word.startswith("--"):
            is_own = word.partition("=")[0] in OWN_FLAGS
        if not is_own:
            yield word
    yield from found.candidates[0].words(found.device.node_size, found.config)


def run_command(config: RunConfig) -> str:
    """Return the command that trains so: `finetune` prepares data and weights, `pretrain` takes both as they are."""
    is_finetuning = config.finetune.task is not None or config.adapter.is_used
    return "finetune" if is_finetuning else "pretrain"


def print_scaling(rows: Sequence[ScalingRow], config: RunConfig) -> None:
    """Print the first choice for each number of GPUs, with the run's own batch and with one that grows."""
    heads = ["GPUs", "batch", "layout", "GB/GPU", "s/step", "tokens/s/GPU", "of peak", "tokens/s"]
    for title, pick in (("the same batch", "same_batch"), ("a batch that grows", "grown_batch")):
        lines = [heads]
        for row in rows:
            candidate: Candidate | None = getattr(row, pick)
            if candidate is None:
                lines.append([str(row.gpus), "", "none", *[""] * 5])
                continue
            lines.append(
                [
                    f"{row.gpus:,}",
                    f"{candidate.config.training.global_batch_size:,}",
                    candidate.name,
                    f"{candidate.memory.total / 1e9:.1f}",
                    format_figure(candidate.time.total),
                    f"{candidate.tokens_per_second_per_gpu:,.0f}",
                    f"{100 * candidate.mfu:.1f} %",
                    f"{candidate.tokens_per_second_per_gpu * row.gpus:,.0f}",
                ]
            )
        print(f"{title}, {config.data.seq_length} tokens a sequence")
        print("\n".join(align(lines, num_left=0)))
        print()
