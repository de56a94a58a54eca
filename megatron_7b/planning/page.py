"""A plan as a page: layouts side by side, with what fills their memory and their time. One file, nothing to fetch."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_7b.files import write_output
from megatron_7b.model.sizes import count_parameters
from megatron_7b.page_parts import STYLE, card, escape, format_figure, table
from megatron_7b.planning.advice import Advice
from megatron_7b.planning.candidate import Candidate
from megatron_7b.planning.planner import Plan

_COLOURS = {
    "parameters": "#2463a8", "gradients": "#5f9bd3", "optimizer": "#a9c8e6", "activations": "#d1495b",
    "logits": "#e9a0a8", "nccl": "#7a8794", "graphs": "#98a4b0", "context": "#b8c1ca",
    "matrix_products": "#2463a8", "attention": "#5f9bd3", "memory_bound": "#a9c8e6", "recompute": "#d1495b",
    "tensor_parallel": "#d98a2b", "context_parallel": "#e3aa63", "expert_parallel": "#edc999", "pipeline": "#7d5ba6",
    "data_parallel": "#3d8b6e", "optimizer_time": "#8fc1ae", "host": "#b8c1ca",
}  # fmt: skip
_OWN_STYLE = """
.bar { height: 1.1rem; } .over { color: var(--gone); } td.name { min-width: 11em; overflow-wrap: normal; }
td.name:has(.bar) { width: 100%; }
.key i { margin: 0 .35em 0 0; } .key span { white-space: nowrap; margin-right: 1em; }
@media (max-width: 600px) { body { padding: 1.2rem .8rem 3rem; } th, td { padding: .34rem .35rem; }
  th { white-space: normal; min-width: 3em; } td.name { min-width: 8em; } }
"""


def write_page(path: Path, found: Plan, advice: Sequence[Advice] = (), command: str = "") -> None:
    """Write a plan as an html file, which appears complete or not at all.

    Args:
        path: The file.
        found: The plan.
        advice: What would fit, if nothing does.
        command: That runs the first choice; empty: what it needs beside the run's own arguments.
    """
    write_output(path, page(found, advice, command))


def page(found: Plan, advice: Sequence[Advice] = (), command: str = "") -> str:
    """Return the html of `write_page`."""
    command = command or shlex.join(found.candidates[0].words(found.device.node_size, found.config))
    config, first = found.config, found.candidates[0]
    title = f"{count_parameters(config.model) / 1e9:.2f} B parameters on {found.world_size} × {found.device.title}"
    tokens = config.training.global_batch_size * config.data.seq_length
    cards = [
        card(f"{first.memory.total / 1e9:.1f} GB", f"of {found.device.memory_bytes / 1e9:.1f} on the fullest GPU"),
        card(f"{format_figure(first.time.total)} s", f"a step of {tokens:,} tokens"),
        card(f"{first.tokens_per_second_per_gpu:,.0f}", "tokens/s per GPU"),
        card(f"{100 * first.mfu:.1f} %", "of the GPU's rate"),
    ]
    chosen = "First choice" if found.fits else "The smallest, which does not fit"
    first_choice = f"<p>{chosen}: <b>{escape(first.name)}</b>{''.join(f', {one}' for one in first.details)}</p>"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="note">{config.training.global_batch_size} sequences of {config.data.seq_length} tokens a step.</p>',
        first_choice,
        f'<div class="cards">{"".join(cards)}</div>',
        _advice(found, advice),
        "<h2>Memory of the fullest GPU</h2>",
        _key(*(candidate.memory.as_dict() for candidate in found.candidates)),
        _memory_table(found),
        "<h2>Time of a step</h2>",
        _key(*(_times(candidate) for candidate in found.candidates)),
        _time_table(found),
        "<h2>How to run the first</h2>" if found.fits else "",
        f"<pre>{escape(command)}</pre>" if found.fits else "",
        *(f'<p class="note">{escape(note)}</p>' for note in found.notes),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}{_OWN_STYLE}</style></head>'
        f"<body>{''.join(parts)}</body></html>"
    )


def _advice(found: Plan, advice: Sequence[Advice]) -> str:
    if found.fits:
        return ""
    if not advice:
        return "<p>No layout fits, nor would one with any change that was tried.</p>"
    rows = [
        [
            f'{escape(one.change)} <span class="quiet">{escape(", ".join(_with_details(one.candidate)))}</span>',
            f"{one.candidate.memory.total / 1e9:.1f}",
            f"{one.candidate.tokens_per_second_per_gpu:,.0f}",
        ]
        for one in advice
    ]
    return "<h2>No layout fits. These changes would</h2>" + table(["change", "GB", "tokens/s per GPU"], rows, (0,))


def _with_details(candidate: Candidate) -> tuple[str, ...]:
    return candidate.name, *candidate.details


def _memory_table(found: Plan) -> str:
    whole = max(found.device.memory_bytes, *(candidate.memory.total for candidate in found.candidates))
    rows = [
        [
            _layout(candidate) + _stack(candidate.memory.as_dict(), whole, "GB", 1e9),
            f'<span class="{"" if candidate.fits else "over"}">{candidate.memory.total / 1e9:.1f}</span>',
        ]
        for candidate in found.candidates
    ]
    return table([f"layout; full width: {whole / 1e9:.1f} GB", "GB"], rows, (0,))


def _time_table(found: Plan) -> str:
    slowest = max(candidate.time.total for candidate in found.candidates)
    rows = [
        [
            _layout(candidate, f"; {candidate.limit}") + _stack(_times(candidate), slowest, "ms", 1e-3),
            format_figure(candidate.time.total),
            f"{candidate.tokens_per_second_per_gpu:,.0f}",
            f"{100 * candidate.mfu:.1f} %",
        ]
        for candidate in found.candidates
    ]
    return table(["layout; what limits it", "s", "tokens/s per GPU", "of peak"], rows, (0,))


def _layout(candidate: Candidate, more: str = "") -> str:
    """Return the name of a layout, and in a second line what else distinguishes it."""
    micro_batch = candidate.config.training.micro_batch_size
    others = [f"micro batch {micro_batch} × {candidate.num_microbatches}", *candidate.details]
    return f'{escape(candidate.name)} <span class="quiet">{escape(", ".join(others) + more)}</span>'


def _times(candidate: Candidate) -> dict[str, float]:
    """Return the parts of a step, the optimizer under a name that memory does not have as well."""
    return {("optimizer_time" if name == "optimizer" else name): s for name, s in candidate.time.as_dict().items()}


def _stack(values: Mapping[str, float], whole: float, unit: str, size: float) -> str:
    pieces = "".join(
        f'<i style="width:{100 * value / whole:.3f}%;background:{_COLOURS[name]}" '
        f'title="{_words(name)}: {value / size:,.1f} {unit}"></i>'
        for name, value in values.items()
        if name != "total" and value
    )
    return f'<div class="bar">{pieces}</div>'


def _key(*shown: Mapping[str, float]) -> str:
    pieces = "".join(
        f'<span><i style="background:{_COLOURS[name]}"></i>{_words(name)}</span> '
        for name in _COLOURS
        if any(values.get(name) for values in shown)
    )
    return f'<p class="key quiet">{pieces}</p>'


def _words(name: str) -> str:
    return escape(name.removesuffix("_time").replace("_", " "))
