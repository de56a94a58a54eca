"""report.html: an evaluation on tasks in one file that needs nothing else: no script, nothing fetched."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_7b import page_parts as parts
from megatron_7b.evaluation.harness.results import Measure, TaskResults
from megatron_7b.evaluation.report.comparison import ComparedMeasure, compare_results, is_mean
from megatron_7b.evaluation.report.items import Item, items_of
from megatron_7b.evaluation.report.statistics import Bin, calibration, confusion, interval
from megatron_7b.page_parts import escape
from megatron_7b.runtime.rescue import write_or_rescue

_WORST_SHOWN = 5
_MOST_ANSWERS = 10
"""Of a confusion matrix."""
_QUESTION_CHARACTERS = 700
_PLOT = 260
_MARGIN = 60


def write_report(file: Path, content: Mapping[str, Any], *, other: Mapping[str, Any] | None = None) -> None:
    """Write the page; it appears complete or not at all. Raises as `write_or_rescue`.

    Args:
        file: The html file.
        content: What `TaskResults` holds.
        other: Another evaluation, which this one is compared with.
    """
    page = render_results(content, other=other)
    write_or_rescue(file, lambda stream: stream.write(page))


def render_results(content: Mapping[str, Any], *, other: Mapping[str, Any] | None = None) -> str:
    """Return the page as html; all text of models and data is escaped."""
    items: dict[str, list[Item]] = {}
    for item in items_of(content):
        items.setdefault(item.task, []).append(item)
    sections = [_summary(content), _figures(list(TaskResults(content).measures()), items)]
    if other is not None:
        sections.append(_comparison(compare_results(other, content), content, other))
    sections += [_task(task, of_task) for task, of_task in items.items()]
    if not items:
        sections.append('<p class="note">Questions were not logged: <code>--log-samples</code> keeps them.</p>')
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Evaluation</title><style>{parts.STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )


def _summary(content: Mapping[str, Any]) -> str:
    counts = content.get("n-samples", {})
    asked = sum(int(one.get("effective", 0)) for one in counts.values())
    cards = [parts.card(str(len(content["results"])), "tasks"), parts.card(parts.format_number(asked), "questions")]
    return f'<h1>Evaluation</h1><p class="note">{escape(_name(content))}</p><div class="cards">{"".join(cards)}</div>'


def _name(content: Mapping[str, Any]) -> str:
    about = content.get("megatron_7b", {})
    harness = f"lm-evaluation-harness {content.get('lm_eval_version', '')}"
    return ", ".join(part for part in (about.get("checkpoint"), about.get("date"), harness) if part)


def _figures(measures: Sequence[Measure], items: Mapping[str, Sequence[Item]]) -> str:
    rows = []
    for one in measures:
        values = [item.values[one.title] for item in items.get(one.task, ()) if one.title in item.values]
        shown = "" if one.error is None else f"± {one.error:.4f}"
        if is_mean(one, values):
            low, high = interval(values)
            shown = f"{low:.4f} to {high:.4f}"
        shots = "" if one.shots is None else str(one.shots)
        rows.append([escape(one.task), escape(one.title), shots, f"{one.value:.4f}", shown])
    note = "The last column is where the figure lies with 95 % confidence (questions resampled), or its standard error."
    columns = ["task", "measure", "shots", "value", "95 % interval"]
    return f'<h2>Figures</h2><p class="note">{note}</p>{parts.table(columns, rows, (0, 1))}'


def _comparison(compared: Sequence[ComparedMeasure], content: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    rows = []
    for one in compared:
        tested = ["", "", ""]
        if one.test is not None:
            low, high = one.test.interval
            tested = [f"{low:+.4f} to {high:+.4f}", f"{one.test.better} / {one.test.worse}", f"{one.test.p_value:.3g}"]
        values = [f"{one.first.value:.4f}", f"{one.second.value:.4f}", f"{one.second.value - one.first.value:+.4f}"]
        rows.append([escape(one.first.task), escape(one.first.title), *values, *tested])
    columns = ["task", "measure", "before", "now", "difference", "95 % interval", "better / worse", "p"]
    note = f"Before: {_name(other)}. Now: {_name(content)}. p: how often chance alone makes such a difference."
    return f'<h2>Comparison</h2><p class="note">{escape(note)}</p>{parts.table(columns, rows, (0, 1))}'


def _task(task: str, items: Sequence[Item]) -> str:
    chosen = [item for item in items if item.loss is not None]
    plots = f'<div class="plots">{_calibration(chosen)}{_confusion(chosen)}</div>' if chosen else ""
    shown = plots + _worst(items)
    return f"<h2>{escape(task)}</h2>{shown}" if shown else ""


def _calibration(items: Sequence[Item]) -> str:
    bins, error = calibration([max(item.shares) for item in items], [item.chosen == item.target for item in items])
    note = f"How sure the model is of its answers, and how many are right. Expected calibration error {error:.3f}."
    return f'<div><p class="note">{note}</p>{_reliability(bins)}</div>'


def _reliability(bins: Sequence[Bin]) -> str:
    def place(x: float, y: float) -> tuple[float, float]:
        return _MARGIN + x * _PLOT, _PLOT + 10 - y * _PLOT

    pieces = []
    for tick in (0.0, 0.5, 1.0):
        x, y = place(tick, tick)
        pieces.append(f'<line x1="{_MARGIN}" x2="{_MARGIN + _PLOT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        pieces.append(f'<text x="{_MARGIN - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.0%}</text>')
        pieces.append(f'<text x="{x:.1f}" y="{_PLOT + 26}" text-anchor="middle">{tick:.0%}</text>')
    (x1, y1), (x2, y2) = place(0, 0), place(1, 1)
    pieces.append(f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke-dasharray="4 4"/>')
    for one in bins:
        (left, top), (right, bottom) = place(one.low, one.accuracy), place(one.high, 0)
        title = f"<title>{one.count:,} answers: {one.confidence:.0%} sure, {one.accuracy:.0%} right</title>"
        pieces.append(
            f'<rect class="kept" x="{left + 2:.1f}" y="{top:.1f}" width="{right - left - 4:.1f}" '
            f'height="{max(1.0, bottom - top):.1f}">{title}</rect>'
        )
    middle = _PLOT / 2 + 10
    pieces.append(f'<text x="{_MARGIN + _PLOT / 2}" y="{_PLOT + 44}" text-anchor="middle">share of the answer</text>')
    pieces.append(f'<text transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">right</text>')
    box = f"0 0 {_MARGIN + _PLOT + 24} {_PLOT + 50}"
    return f'<svg viewBox="{box}" style="max-width:360px" role="img" aria-label="calibration">{"".join(pieces)}</svg>'


def _confusion(items: Sequence[Item]) -> str:
    num_answers = max(len(item.answers) for item in items)
    if num_answers > _MOST_ANSWERS:
        return ""
    targets = [item.target for item in items if isinstance(item.target, int)]
    counts = confusion(targets, [item.chosen or 0 for item in items], num_answers)
    same = len({item.answers for item in items}) == 1
    names = (
        [escape(name.strip()) for name in items[0].answers] if same else [f"answer {n + 1}" for n in range(num_answers)]
    )
    rows = [[names[right], *(f"{count:,}" for count in counts[right])] for right in range(num_answers)]
    heads = ["right ↓ chosen →", *(items[0].answers if same else names)]
    return f'<div><p class="note">Which answers are taken for which.</p>{parts.table(heads, rows)}</div>'


def _worst(items: Sequence[Item]) -> str:
    """Return the questions on which the model is worst: by loss, else those that it got wrong."""
    by_loss = sorted((item for item in items if item.loss is not None), key=lambda item: -(item.loss or 0.0))
    wrong = by_loss or [item for item in items if item.values and max(item.values.values()) <= 0 and item.written]
    shown = wrong[:_WORST_SHOWN]
    if not shown:
        return ""
    return f"<details><summary><b>Worst questions</b></summary>{''.join(map(_question, shown))}</details>"


def _question(item: Item) -> str:
    end = item.question[-_QUESTION_CHARACTERS:]
    text = ("…" if len(end) < len(item.question) else "") + end
    if item.written is not None:
        answers = f"wrote: {item.written}\nright: {item.target}"
    else:
        marks = {item.chosen: "chosen", item.target: "right"}
        lines = [
            f"{share:7.2%}  {answer.strip()}{f'  ← {marks[number]}' if number in marks else ''}"
            for number, (share, answer) in enumerate(zip(item.shares, item.answers, strict=False))
        ]
        answers = "\n".join(lines)
    return f'<div class="sample"><pre>{escape(text)}</pre><pre>{escape(answers)}</pre></div>'
