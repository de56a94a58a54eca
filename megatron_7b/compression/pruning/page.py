"""The report of a pruning as one page of html: sizes, perplexity, and the scores of what was removed and kept."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron_7b import page_parts as parts
from megatron_7b.compression.pruning.result import PrunedCheckpoint
from megatron_7b.compression.pruning.scores import Floats
from megatron_7b.page_parts import escape
from megatron_7b.runtime.rescue import write_or_rescue


def write_page(pruned: PrunedCheckpoint, file: Path) -> None:
    """Write the report.

    Args:
        pruned: What it is about.
        file: The page; one that is there is replaced.

    Raises:
        MegatronError: It is not at that path; the message says where it is.
    """
    page = _page(pruned)
    write_or_rescue(file, lambda stream: stream.write(page))


def _page(pruned: PrunedCheckpoint) -> str:
    heads, *rows = pruned.rows()
    before, after = pruned.parameters
    first, second = pruned.perplexities
    cards = [
        parts.card(f"{after / before:.1%}", "of the parameters are left"),
        parts.card(f"{first:.2f}", "perplexity before"),
        parts.card(f"{second:.2f}", "perplexity after"),
    ]
    sections = [*_layers(pruned), *_heads(pruned), *_neurons(pruned), *_channels(pruned)]
    name = escape(pruned.folder.name)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Pruning: {name}</title><style>{parts.STYLE}</style><h1>Pruning: {name}</h1>"
        f'<p class="note">{escape(pruned.plan.describe())}</p><div class="cards">{"".join(cards)}</div>'
        f"<h2>Sizes</h2>{parts.table(heads, [[escape(cell) for cell in row] for row in rows])}"
        f"{''.join(sections)}<h2>Next</h2><pre>{escape(pruned.healing_command())}</pre></html>\n"
    )


def _layers(pruned: PrunedCheckpoint) -> Iterator[str]:
    kept, options = pruned.measured.kept, pruned.plan.options
    if not pruned.plan.num_removed:
        return
    yield "<h2>Layers</h2>"
    if not kept.candidates:
        yield f"<p>Removed as given: {', '.join(map(str, kept.removed))}.</p>"
        return
    score = options.depth_score.replace("_", " ")
    yield f'<p class="note">By {score}: the lower, the less a layer is missed. {_KEY}</p>'
    lowest = min(0.0, *(one.score for one in kept.candidates))
    if options.depth_score == "perplexity":  # losses are all alike: show what is above the lowest
        lowest = min(one.score for one in kept.candidates)
    widest = max(one.score for one in kept.candidates) - lowest
    rows = []
    for one in kept.candidates:
        kind = "gone" if set(one.layers) <= set(kept.removed) else "kept"
        name = str(one.layers[0]) if len(one.layers) == 1 else f"{one.layers[0]} to {one.layers[-1]}"
        rows.append([name, parts.bar([(kind, one.score - lowest)], widest), f"{one.score:.4f}"])
    yield parts.table(["layers, from 0", "", "score"], rows)


def _heads(pruned: PrunedCheckpoint) -> Iterator[str]:
    source, target, kept = pruned.plan.source, pruned.plan.target, pruned.measured.kept
    if source.num_attention_heads == target.num_attention_heads:
        return
    queries = source.num_attention_heads // source.query_groups
    rows = []
    for layer, groups in zip(kept.layers, kept.groups, strict=True):
        scores = pruned.measured.scores.heads[layer]
        chosen = {group * queries + member for group, members in groups for member in members}
        pieces = [("kept" if head in chosen else "gone", float(score)) for head, score in enumerate(scores)]
        gone = ", ".join(str(head) for head in range(len(scores)) if head not in chosen)
        rows.append([str(layer), parts.bar(pieces, float(scores.sum())), gone])
    yield f'<h2>Heads</h2><p class="note">As wide as their share of the score of their layer. {_KEY}</p>'
    yield parts.table(["layer", "", "removed query heads"], rows)


def _neurons(pruned: PrunedCheckpoint) -> Iterator[str]:
    source, target, kept = pruned.plan.source, pruned.plan.target, pruned.measured.kept
    if source.ffn_hidden_size == target.ffn_hidden_size:
        return
    rows = [
        [str(layer), *_kept_share(pruned.measured.scores.units[layer], units)]
        for layer, units in zip(kept.layers, kept.units, strict=True)
    ]
    yield f'<h2>Neurons</h2><p class="note">Share of the score of the layer that is kept. {_KEY}</p>'
    yield parts.table(["layer", "", "kept", "least kept", "greatest removed"], rows)


def _channels(pruned: PrunedCheckpoint) -> Iterator[str]:
    source, target = pruned.plan.source, pruned.plan.target
    if source.hidden_size == target.hidden_size:
        return
    cells = _kept_share(pruned.measured.scores.channels, pruned.measured.kept.channels)
    yield f'<h2>Channels</h2><p class="note">Share of the score of the residual stream that is kept. {_KEY}</p>'
    yield parts.table(["", "kept", "least kept", "greatest removed"], [list(cells)])


def _kept_share(scores: Floats, kept: np.ndarray) -> Sequence[str]:
    """Return a bar, the share that is kept, and the scores at the border."""
    gone = np.delete(scores, kept)
    whole, share = float(scores.sum()), float(scores[kept].sum())
    bar = parts.bar([("kept", share), ("gone", whole - share)], whole)
    return bar, parts.format_share(share, whole), f"{scores[kept].min():.4g}", f"{gone.max(initial=0.0):.4g}"


_KEY = '<span class="key"><i class="kept"></i>kept<i class="gone"></i>removed</span>'
