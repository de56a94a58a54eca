"""Pieces of the report: figures as people write them, tables, bars, histograms; each a string of html."""

import html
import math
from collections.abc import Mapping, Sequence

_HISTOGRAM_WIDTH, _HISTOGRAM_HEIGHT = 520, 190

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --quiet: #5b6470; --line: #dfe3e8; --page: #fff; --card: #f6f7f9;
  --kept: #2463a8; --read: #b9c7d8; --gone: #d1495b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --quiet: #9aa4b1; --line: #333b46; --page: #14181e;
  --card: #1c222a; --kept: #6aa7e8; --read: #44546a; --gone: #e8788a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 2.2rem 1.4rem 4rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { font-size: 1.65rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2.6rem 0 .3rem; }
p { margin: .2rem 0 .9rem; } p.note, caption, .quiet { color: var(--quiet); }
code, pre { font: .86em/1.45 ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--card); border-radius: 6px; margin: .3rem 0;
  padding: .6rem .8rem; }
code.command { overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .7rem; margin: 1.2rem 0; }
.card { background: var(--card); border-radius: 8px; padding: .7rem .9rem; }
.card b { display: block; white-space: nowrap; font-size: 1.35rem; font-weight: 650; }
.card span { color: var(--quiet); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .34rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { color: var(--quiet); font-weight: 550; white-space: nowrap; } td { white-space: nowrap; }
th.text, td.text { text-align: left; } td.wide { width: 34%; min-width: 150px; white-space: normal; }
td.name { white-space: normal; min-width: 8.5em; overflow-wrap: anywhere; text-align: left; }
.bar { display: flex; height: .85rem; border-radius: 3px; overflow: hidden; background: none; margin-top: .28rem; }
.bar i { display: block; } .kept { background: var(--kept); fill: var(--kept); }
.gone { background: var(--gone); fill: var(--gone); }
.read { background: var(--read); fill: var(--read); }
.key i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin: 0 .35em 0 1em; }
.key i:first-child { margin-left: 0; }
svg { width: 100%; max-width: 720px; height: auto; } svg text { fill: var(--quiet); font-size: 12px; }
svg line { stroke: var(--line); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 0 2rem; }
@media (max-width: 520px) { .plots { grid-template-columns: 1fr; } }
details { border-bottom: 1px solid var(--line); padding: .45rem 0; } summary { cursor: pointer; }
summary b { font-weight: 600; } .sample { margin: .7rem 0 1.1rem; }
"""


def escape(value: object) -> str:
    """Any value as text that is safe anywhere in html."""
    return html.escape(str(value))


def format_number(value: float) -> str:
    """1234567 as 1,234,567."""
    return f"{value:,.0f}"


def format_figure(value: float) -> str:
    """Return a number with three digits that count, or all of its whole ones, and no power of ten: 0.123, 1,390."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def format_size(value: float) -> str:
    """Return a large number with three digits: 999, 1.23 k, 4.56 M."""
    for unit in ("", " k", " M", " G", " T"):
        if abs(value) < 999.5 or unit == " T":
            break
        value /= 1000
    return f"{value:.3g}{unit}"


def format_share(part: float, whole: float) -> str:
    """Return a part in percent, never rounded to all or nothing."""
    if not whole:
        return "–"
    percent = 100 * part / whole
    if 0 < percent < 0.1:
        return "< 0.1 %"
    return "> 99.9 %" if 99.9 < percent < 100 else f"{percent:.1f} %"


def format_seconds(seconds: float) -> str:
    """Return a duration in the two largest units that it has."""
    if 0 < seconds < 0.05:
        return "< 0.1 s"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole // 60 % 60} min"


def card(value: str, name: str) -> str:
    """Return one figure, large, with what it is."""
    return f'<div class="card"><b>{escape(value)}</b><span>{escape(name)}</span></div>'


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], text_columns: Sequence[int] = (0,)) -> str:
    """Return a table.

    Args:
        columns: Headings.
        rows: Cells as html.
        text_columns: Which columns hold text and not numbers, and may break lines.
    """
    heads = "".join(
        f'<th class="{"text" if index in text_columns else ""}">{escape(name)}</th>'
        for index, name in enumerate(columns)
    )
    body = "".join(
        f"<tr>{''.join(_cell(cell, index in text_columns) for index, cell in enumerate(row))}</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(content: str, is_text: bool) -> str:
    kind = "wide" if content.startswith('<div class="bar"') else "name" if is_text else ""
    return f'<td class="{kind}">{content}</td>'


def bar(parts: Sequence[tuple[str, float]], whole: float) -> str:
    """Return a horizontal bar.

    Args:
        parts: Class of its colour and size of each piece, from the left.
        whole: The size that the full width means.
    """
    pieces = "".join(f'<i class="{kind}" style="width:{100 * size / (whole or 1):.3f}%"></i>' for kind, size in parts)
    return f'<div class="bar">{pieces}</div>'


def ranking(counts: Mapping[str, int], name: str, *, whole: int, limit: int = 25, kind: str = "gone") -> str:
    """Return the largest counts as a table with bars; what is left over is one more row.

    Args:
        counts: By name.
        name: What the names are.
        whole: What the shares are of.
        limit: Rows shown.
        kind: Colour of the bars.
    """
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rows = [
        [escape(label), bar([(kind, count)], ordered[0][1]), format_number(count), format_share(count, whole)]
        for label, count in ordered[:limit]
    ]
    if rest := ordered[limit:]:
        count = sum(count for _, count in rest)
        label = f'<span class="quiet">{len(rest)} more</span>'
        rows.append([label, "", format_number(count), format_share(count, whole)])
    return table([name, "", "documents", "share"], rows)


def histogram(
    series: Sequence[tuple[str, Mapping[int, int]]], labels: Mapping[int, str], *, axis: str, start: int | None = None
) -> str:
    """Columns over whole numbers, the series one before the other, as SVG.

    Args:
        series: Colour and counts of each, the largest first: later ones are drawn over it.
        labels: What is written under some of the numbers.
        axis: What the numbers are.
        start: The number on the left; None begins where the counts do.
    """
    places = [place for _, counts in series for place, count in counts.items() if count]
    if not places:
        return '<p class="note">None.</p>'
    first, last = min(places) if start is None else start, max(places)
    last = max(last, first + 5)
    highest = max(max(counts.values(), default=0) for _, counts in series)
    left, bottom, top = 52, _HISTOGRAM_HEIGHT - 40, 14
    step = (_HISTOGRAM_WIDTH - left - 8) / (last - first + 1)
    pieces = []
    for count in {highest // 2, highest} - {0}:
        height = bottom - count / highest * (bottom - top)
        pieces.append(f'<line x1="{left}" x2="{_HISTOGRAM_WIDTH}" y1="{height:.1f}" y2="{height:.1f}"/>')
        pieces.append(f'<text x="{left - 7}" y="{height + 4:.1f}" text-anchor="end">{format_size(count)}</text>')
    for number, (kind, counts) in enumerate(series):
        width = step * (0.84 - 0.36 * number)  # narrower in front, so that the one at the back is seen wherever it ends
        for place, count in sorted(counts.items()):
            height = count / highest * (bottom - top)
            x = left + (place - first + 0.5) * step - width / 2
            title = f"<title>{escape(labels.get(place, place))}: {format_number(count)}</title>"
            pieces.append(
                f'<rect class="{kind}" x="{x:.1f}" y="{bottom - height:.1f}" width="{width:.1f}" '
                f'height="{height:.1f}">{title}</rect>'
            )
    widest = max(len(labels.get(place, "")) for place in range(first, last + 1)) * 7 + 14
    for place in range(first, last + 1):
        if place in labels and (place - first) % math.ceil(widest / step) == 0:
            x = left + (place - first + 0.5) * step
            pieces.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{escape(labels[place])}</text>')
    middle = (left + _HISTOGRAM_WIDTH) / 2
    pieces.append(f'<text x="{middle:.0f}" y="{_HISTOGRAM_HEIGHT - 5}" text-anchor="middle">{escape(axis)}</text>')
    pieces.append(f'<line x1="{left}" x2="{_HISTOGRAM_WIDTH}" y1="{bottom}" y2="{bottom}"/>')
    box = f"0 0 {_HISTOGRAM_WIDTH} {_HISTOGRAM_HEIGHT}"
    return f'<svg viewBox="{box}" role="img" aria-label="{escape(axis)}">{"".join(pieces)}</svg>'
