"""report.html: what a run of data preparation read, kept and dropped, in one file that needs nothing else."""

import html
import json
import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_7b import page_parts as parts
from megatron_7b.files import replace_text
from megatron_7b.page_parts import escape, format_number, format_seconds, format_share, format_size
from megatron_7b.prepare.accounting import Distributions, RunReport, Sample, StageCount

_SOURCES_SHOWN = 40
_FILES_OF_A_FOLDER = 10
"""More are one row, where there are more sources than are shown."""
_SAMPLES_PER_REASON = 3
_SAMPLE_CHARACTERS = 600


def write_report(report: RunReport, samples: Mapping[str, Sequence[Sample]], path: Path) -> None:
    """Write the report; it appears complete or not at all.

    Args:
        report: The counts of the run.
        samples: By stage, documents that it dropped.
        path: The html file.
    """
    replace_text(path, render_report(report, samples))


def render_report(report: RunReport, samples: Mapping[str, Sequence[Sample]]) -> str:
    """Return the report as one html document: no script, nothing fetched, text from documents escaped."""
    sections = [
        _summary(report),
        _stages(report.stages),
        _reasons(report.stages),
        _plots(report.distributions),
        _languages(report.distributions),
        _splits(report.distributions),
        _sources(report),
        _samples(samples, report.stages),
        _recipe(report),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Data preparation</title><style>{parts.STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )


def _summary(report: RunReport) -> str:
    first, last = report.stages[0], report.stages[-1]
    made = sum(stage.added for stage in report.stages)
    size = sum(int(one["bytes"]) for one in report.inputs)
    cards = [
        parts.card(format_number(first.documents_in), "records read"),
        parts.card(format_number(last.kept), f"written ({format_share(last.kept, first.documents_in)})"),
        parts.card(format_size(last.characters_kept), "characters written"),
        parts.card(f"{format_size(size)}B", f"in {len(report.inputs):,} file{'s' * (len(report.inputs) != 1)}"),
        parts.card(format_seconds(report.wall_seconds), f"with {report.workers} worker{'s' * (report.workers != 1)}"),
    ]
    if made:
        cards.insert(2, parts.card(format_number(made), "made by augmentation"))
    if quarantined := sum(stage.quarantined for stage in report.stages):
        cards.insert(2, parts.card(format_number(quarantined), "unreadable records"))
    command = escape(shlex.join(report.command))
    return (
        f"<h1>Data preparation</h1><p class=note>megatron-7b {escape(report.version)}"
        f'<br><code class="command">{command}</code></p><div class="cards">{"".join(cards)}</div>'
    )


def _stages(stages: Sequence[StageCount]) -> str:
    """Return one row per stage; columns in which no row has anything are left out."""
    most = max((stage.documents_in + stage.added for stage in stages), default=1)
    gone = [stage.removed.total() + stage.quarantined for stage in stages]
    speeds = [stage.characters_per_second for stage in stages]
    columns: dict[str, list[str]] = {
        "stage": [escape(stage.name.replace("_", " ")) + _describe_changes(stage) for stage in stages]
    }
    if any(gone):
        pairs = zip(stages, gone, strict=True)
        columns[""] = [parts.bar([("kept", stage.kept), ("gone", number)], most) for stage, number in pairs]
    columns["in"] = [format_number(stage.documents_in) for stage in stages]
    columns["made"] = [format_number(stage.added) if stage.added else "" for stage in stages]
    columns["dropped"] = [format_number(number) if number else "" for number in gone]
    columns["kept"] = [format_number(stage.kept) for stage in stages]
    columns["time"] = [format_seconds(stage.seconds) if stage.seconds else "" for stage in stages]
    columns["M chars/s"] = ["" if speed is None else f"{speed / 1e6:,.1f}" for speed in speeds]
    columns["memory"] = [f"{stage.peak_memory / 2**20:,.0f} MiB" if stage.peak_memory else "" for stage in stages]
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    rows = list(zip(*shown.values(), strict=True))
    return f"<h2>Stages</h2>{_stages_note(any(gone), any(speeds))}{parts.table(list(shown), rows)}"


def _stages_note(anything_gone: bool, any_speed: bool) -> str:
    key = '<i class="kept"></i>kept<i class="gone"></i>dropped. ' if anything_gone else ""
    balance = "In every row, in + made = kept + dropped. " if anything_gone else ""
    speed = "" if any_speed else "Every stage was over too soon for a speed to mean anything. "
    return f'<p class="note key">{key}{balance}{speed}Time is of one core; memory is the most of one worker.</p>'


def _describe_changes(stage: StageCount) -> str:
    changes = ", ".join(f"{format_number(count)} {escape(kind)}" for kind, count in stage.changes.most_common())
    return f'<br><span class="quiet">changed: {changes}</span>' if changes else ""


def _reasons(stages: Sequence[StageCount]) -> str:
    reasons: Counter[str] = Counter()
    for stage in stages:
        reasons.update(stage.removed)
    if not reasons:
        written = format_number(stages[-1].kept)
        return f"<h2>Nothing was dropped</h2><p>All {written} documents passed every stage.</p>"
    return (
        f"<h2>Why documents were dropped</h2>{parts.ranking(reasons, 'reason', whole=stages[0].documents_in, limit=40)}"
    )


def _plots(distributions: Distributions) -> str:
    lengths = distributions.lengths
    labels = {bits: format_size(2 ** (bits - 1)) if bits else "0" for bits in range(64)}
    plots = [
        '<div><h2>Lengths</h2><p class="note key"><i class="read"></i>read<i class="kept"></i>written</p>'
        + parts.histogram(
            [("read", lengths.get("read", {})), ("kept", lengths.get("kept", {}))],
            labels,
            axis="characters of a document, from this power of two to the next",
        )
        + "</div>"
    ]
    for name, groups in distributions.duplicate_groups.items():
        repeats = {size: count for size, count in groups.items() if size > 1}
        if repeats:
            bins: Counter[int] = Counter()
            for size, count in repeats.items():
                bins[(size - 1).bit_length()] += count
            spans = {1: "2", 2: "3–4"} | {bits: f"{2 ** (bits - 1) + 1:,}–{2**bits:,}" for bits in range(3, 40)}
            extra = sum((size - 1) * count for size, count in repeats.items())
            plots.append(
                f"<div><h2>Duplicates: {escape(name)}</h2><p class=note>{format_number(extra)} documents dropped "
                f"as repeating one of {format_number(sum(repeats.values()))}</p>"
                + parts.histogram([("gone", bins)], spans, axis="documents in a group", start=1)
                + "</div>"
            )
    return f'<div class="plots">{"".join(plots)}</div>'


def _languages(distributions: Distributions) -> str:
    if not distributions.languages:
        return ""
    note = '<p class="note">As found, before any document was dropped for it.</p>'
    whole = distributions.languages.total()
    return f"<h2>Languages</h2>{note}{parts.ranking(distributions.languages, 'language', whole=whole, kind='kept')}"


def _splits(distributions: Distributions) -> str:
    whole = sum(split["documents"] for split in distributions.splits.values())
    used = {name: split for name, split in distributions.splits.items() if split["documents"]}
    rows = [
        [
            escape(name),
            format_number(split["documents"]),
            format_share(split["documents"], whole),
            format_size(split["characters"]),
        ]
        for name, split in used.items()
    ]
    if not rows:
        return ""
    note = "" if len(rows) > 1 else "<p class=note>Everything is for training; --split.validation takes a share.</p>"
    return f"<h2>Splits</h2>{note}{parts.table(['split', 'documents', 'share', 'characters'], rows)}"


def _sources(report: RunReport) -> str:
    sizes = Counter({str(one["path"]): int(one["bytes"]) for one in report.inputs})
    sources = report.distributions.sources
    if len(sources) > _SOURCES_SHOWN:
        sources, sizes = _gather_folders(sources, sizes)
    counted = sorted(sources.items(), key=lambda item: -item[1]["read"])
    rows = [
        [
            escape(name),
            f"{format_size(sizes[name])}B" if name in sizes else "",
            format_number(counts["read"]),
            format_number(counts["quarantined"]) if counts["quarantined"] else "",
            format_number(counts["kept"]),
            format_share(counts["kept"], counts["read"]),
        ]
        for name, counts in counted[:_SOURCES_SHOWN]
    ]
    note = (
        f"<p class=note>The {_SOURCES_SHOWN} with the most documents of {len(counted):,}; all are in report.json.</p>"
    )
    columns = ["file", "size", "read", "unreadable", "written", "share"]
    return f"<h2>Sources</h2>{note if len(counted) > _SOURCES_SHOWN else ''}{parts.table(columns, rows)}"


def _gather_folders(
    sources: Mapping[str, Counter[str]], sizes: Counter[str]
) -> tuple[dict[str, Counter[str]], Counter[str]]:
    """Add up the files of each folder that has many."""
    files = Counter(str(Path(name).parent) for name in sources)
    gathered: dict[str, Counter[str]] = {}
    gathered_sizes: Counter[str] = Counter()
    for name, counts in sources.items():
        folder = str(Path(name).parent)
        if files[folder] > _FILES_OF_A_FOLDER:
            key = f"{folder}{os.sep} ({files[folder]:,} files)"
        else:
            key = name
        gathered.setdefault(key, Counter()).update(counts)
        gathered_sizes[key] += sizes[name]
    return gathered, gathered_sizes


def _samples(samples: Mapping[str, Sequence[Sample]], stages: Sequence[StageCount]) -> str:
    order = {stage.name: number for number, stage in enumerate(stages)}
    reasons: Counter[str] = sum((stage.removed for stage in stages), Counter())
    pieces = []
    for _, dropped in sorted(samples.items(), key=lambda item: order.get(item[0], -1)):
        by_reason: dict[str, list[Sample]] = {}
        for sample in dropped:
            by_reason.setdefault(sample.reason, []).append(sample)
        for reason, some in sorted(by_reason.items(), key=lambda item: (-reasons[item[0]], item[0])):
            shown = "".join(_show(sample) for sample in some[:_SAMPLES_PER_REASON])
            pieces.append(
                f"<details><summary><b>{escape(reason)}</b> <span class=quiet>{format_number(reasons[reason])}</span>"
                f"</summary>{shown}</details>"
            )
    if not pieces:
        return ""
    return (
        "<h2>What was dropped</h2><p class=note>A few for each reason, in the order of the stages; more are in "
        f"<code>dropped/</code>.</p>{''.join(pieces)}"
    )


def _show(sample: Sample) -> str:
    text = sample.text[:_SAMPLE_CHARACTERS]
    more = " …" if len(sample.text) > len(text) else ""
    detail = f" · {html.escape(sample.detail)}" if sample.detail else ""
    return (
        f'<div class="sample"><span class="quiet">{escape(sample.source)}:{sample.position}{detail}</span>'
        f'<pre dir="auto">{escape(text)}{more}</pre></div>'
    )


def _recipe(report: RunReport) -> str:
    recipe = json.dumps(report.recipe, indent=2, ensure_ascii=False)
    return f"<h2>Recipe</h2><details><summary>As it was applied</summary><pre>{escape(recipe)}</pre></details>"
