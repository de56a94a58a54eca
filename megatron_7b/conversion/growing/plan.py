"""What a model is to grow into, and which of its layers and heads become which. Imports no torch."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from megatron_7b.config.model_config import with_layer_windows
from megatron_7b.config.schema import ModelConfig
from megatron_7b.errors import ConfigError
from megatron_7b.model.kinds import parameter_table

type Method = Literal["preserve", "stack"]

_KINDS = ("decoder", "encoder", "encoder_decoder")
_LAYER = re.compile(r"(?P<stack>.*\blayers)\.(?P<number>\d+)\.")


@dataclass(frozen=True, kw_only=True)
class GrowOptions:
    """What a model is to become.

    Attributes:
        num_layers: Layers of the larger model; None keeps the number.
        num_decoder_layers: Of an encoder-decoder's decoder; None keeps the number, or follows `num_layers` as before.
        hidden_size: Width of the residual stream; None keeps it.
        ffn_hidden_size: Inner width of the MLP; None keeps it.
        num_attention_heads: Query heads, each as wide as before; None lets them follow `hidden_size`.
        num_query_groups: Key-value heads; None lets them follow the query heads.
        method: How layers are added. `preserve`: copies that add nothing to the residual stream until they are trained.
            `stack`: the whole model again on top of itself, which changes what it computes.
        seed: Of the draw that tells copies apart.
        overwrite: Replace an earlier output of this command.
    """

    num_layers: int | None = None
    num_decoder_layers: int | None = None
    hidden_size: int | None = None
    ffn_hidden_size: int | None = None
    num_attention_heads: int | None = None
    num_query_groups: int | None = None
    method: Method = "preserve"
    seed: int = 1234
    overwrite: bool = False


@dataclass(frozen=True)
class LayerOrigin:
    """Where a layer of the larger model comes from.

    Attributes:
        layer: The layer of the smaller model that it is a copy of.
        is_silent: Its output projections are zero, so that it adds nothing to the residual stream.
    """

    layer: int
    is_silent: bool


@dataclass(frozen=True)
class Growth:
    """A smaller model, a larger one, and how the one becomes the other.

    Attributes:
        source: Shape of the smaller model.
        target: Shape of the larger model.
        layers: Origin of each layer of the larger model, by the beginning of the names in a stack of layers.
        preserves: Whether both compute the same.
        seed: Of the draw that tells copies apart.
    """

    source: ModelConfig
    target: ModelConfig
    layers: Mapping[str, tuple[LayerOrigin, ...]]
    preserves: bool
    seed: int

    def origin_of(self, name: str) -> tuple[str, bool]:
        """Return the parameter that one of the larger model is made from, and whether its layer is silent."""
        match = _LAYER.match(name)
        if match is None:
            return name, False
        origin = self.layers[match["stack"]][int(match["number"])]
        return f"{match['stack']}.{origin.layer}.{name[match.end() :]}", origin.is_silent

    @property
    def duplicates_stream(self) -> bool:
        """Whether the residual stream is widened by equally many copies of every channel."""
        return self.target.hidden_size % self.source.hidden_size == 0

    def describe(self) -> str:
        """Name what grows, in one line."""
        changes = [
            f"{name} {before} to {after}"
            for name, before, after in (
                ("num_layers", self.source.num_layers, self.target.num_layers),
                ("num_decoder_layers", self.source.num_decoder_layers, self.target.num_decoder_layers),
                ("hidden_size", self.source.hidden_size, self.target.hidden_size),
                ("ffn_hidden_size", self.source.ffn_hidden_size, self.target.ffn_hidden_size),
                ("num_attention_heads", self.source.num_attention_heads, self.target.num_attention_heads),
                ("num_query_groups", self.source.query_groups, self.target.query_groups),
            )
            if before != after
        ]
        return ", ".join(changes)


def plan_growth(model: ModelConfig, options: GrowOptions) -> Growth:
    """Decide what a model grows into.

    Args:
        model: The smaller model.
        options: What it is to become.

    Raises:
        ConfigError: It cannot become that, or nothing would grow; all reasons are listed, with the sizes that can be.
    """
    if model.traits.kind not in _KINDS:
        raise ConfigError(
            f"model.architecture is {model.architecture}, of kind {model.traits.kind}, which cannot be grown; "
            f"{' and '.join(_KINDS)} can"
        )
    target = _target(model, options)
    problems = [*_too_small(model, target), *_bad_depth(model, target, options), *_bad_width(model, target)]
    if not problems:  # with other sizes wrong, the heads that follow from them would be as well
        problems = [*_bad_heads(model, target)]
    if problems:
        raise ConfigError("the model cannot grow into that:\n  " + "\n  ".join(problems))
    if target == model:
        raise ConfigError(
            "nothing would grow: the sizes that are asked for are those of the model",
            hint=f"give --num-layers above {model.num_layers}, --hidden-size above {model.hidden_size}, or "
            f"--ffn-hidden-size above {model.ffn_hidden_size}",
        )
    before, after = _count_layers(model), _count_layers(target)
    arrange = _stacked if options.method == "stack" else _interleaved
    layers = {stack: arrange(before[stack], number) for stack, number in after.items()}
    if model.window_size is not None:  # a layer sees what the one that it came from saw
        windows = model.layer_windows
        target = with_layer_windows(target, [windows[one.layer] for one in layers["decoder.layers"]])
    return Growth(model, target, layers, options.method == "preserve" or before == after, options.seed)


def _count_layers(model: ModelConfig) -> dict[str, int]:
    """Return how many layers each stack of a model has, by the beginning of their names."""
    matches = (_LAYER.match(name) for name in parameter_table(model, vocab_size=1))
    found = {(match["stack"], match["number"]) for match in matches if match is not None}
    return dict(Counter(stack for stack, _ in found))


def _stacked(before: int, after: int) -> tuple[LayerOrigin, ...]:
    """Repeat all layers in their order.

    Source: Du et al. 2024, "Stacking Your Transformers" (arXiv 2405.15319), G_stack.
    """
    return tuple(LayerOrigin(layer % before, is_silent=False) for layer in range(after))


def _interleaved(before: int, after: int) -> tuple[LayerOrigin, ...]:
    """Put a silent copy after the layer that it is a copy of, evenly over the depth.

    A layer works on what its neighbours have made of the residual stream; next to its original, a copy gets inputs like
    those it was trained on.

    Source: Wu et al. 2024, "LLaMA Pro" (arXiv 2401.02415), section 3.2.
    """
    sources = [layer * before // after for layer in range(after)]
    return tuple(
        LayerOrigin(source, is_silent=index > 0 and sources[index - 1] == source)
        for index, source in enumerate(sources)
    )


def _target(model: ModelConfig, options: GrowOptions) -> ModelConfig:
    """Return the larger model; heads stay as wide as they are, as queries and keys are rotated by their position."""
    hidden = _given(options.hidden_size, model.hidden_size)
    heads, groups = model.num_attention_heads, model.query_groups
    wanted = options.num_attention_heads
    if wanted is None:
        wanted = heads * hidden // model.hidden_size if heads * hidden % model.hidden_size == 0 else heads
    wanted_groups = options.num_query_groups
    if wanted_groups is None:
        wanted_groups = groups if groups == 1 else groups * wanted // heads
        if groups * wanted % heads:  # as many query heads in a group as before are not possible
            wanted_groups = groups
    follows = model.num_query_groups is None and wanted_groups == wanted
    is_regular = hidden == wanted * model.head_width
    return replace(
        model,
        num_layers=_given(options.num_layers, model.num_layers),
        num_decoder_layers=_given(options.num_decoder_layers, model.num_decoder_layers),
        hidden_size=hidden,
        ffn_hidden_size=_given(options.ffn_hidden_size, model.ffn_hidden_size),
        num_attention_heads=wanted,
        num_query_groups=None if follows else wanted_groups,
        kv_channels=None if model.kv_channels is None and is_regular else model.head_width,
    )


def _given[Size: int | None](size: int | None, before: Size) -> int | Size:
    return before if size is None else size


def _too_small(model: ModelConfig, target: ModelConfig) -> Iterator[str]:
    sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
    found = [(name, getattr(model, name), getattr(target, name)) for name in sizes]
    found.append(("num_query_groups", model.query_groups, target.query_groups))
    found.append(("num_decoder_layers", model.decoder_layers, target.decoder_layers))
    for name, before, after in found:
        if after < before:
            yield f"--{name.replace('_', '-')} is {after}, expected at least {before}, which the model has already"


def _bad_depth(model: ModelConfig, target: ModelConfig, options: GrowOptions) -> Iterator[str]:
    if options.method == "stack":
        for name, before, after in (
            ("--num-layers", model.num_layers, target.num_layers),
            ("--num-decoder-layers", model.decoder_layers, target.decoder_layers),
        ):
            if after > before and after % before:
                yield (
                    f"{name} is {after}, expected a multiple of {before} for --method stack, which repeats them all, "
                    f"such as {_multiples(before, after)}; --method preserve takes any number"
                )
    elif model.traits.norm_placement == "post" and target.num_layers > model.num_layers:
        yield (
            f"--num-layers is {target.num_layers}, but no layer of {model.architecture} changes nothing: its norms "
            "come after attention and MLP, and would normalise again what has been normalised and scaled; --method "
            "stack adds layers that do change something, and --hidden-size and --ffn-hidden-size can grow"
        )


def _bad_width(model: ModelConfig, target: ModelConfig) -> Iterator[str]:
    """An encoder's LayerNorms come after other steps than sums, so the channels that `Filled` adds have no place."""
    before, after = model.hidden_size, target.hidden_size
    if after <= before or after % before == 0:
        return
    if model.traits.kind == "encoder":
        yield (
            f"--hidden-size is {after}, expected a multiple of {before} for {model.architecture}, such as "
            f"{_multiples(before, after)}: its LayerNorms need all channels equally often"
        )


def _bad_heads(model: ModelConfig, target: ModelConfig) -> Iterator[str]:
    heads, groups, width = target.num_attention_heads, target.query_groups, model.head_width
    if not model.traits.has_query_groups and not model.traits.has_wide_heads:
        if heads * width != target.hidden_size:
            yield (
                f"--hidden-size is {target.hidden_size} with {heads} heads, but those of {model.architecture} share "
                f"the hidden size and stay {width} wide: expected a multiple of {width}, such as "
                f"{_multiples(width, target.hidden_size)}, and one head for each {width}"
            )
        return
    if heads % groups:
        yield f"--num-attention-heads is {heads}, expected a multiple of --num-query-groups, which is {groups}"
        return
    queries, slots = model.num_attention_heads // model.query_groups, heads // groups
    if groups // model.query_groups * slots < queries:
        yield (
            f"--num-query-groups is {groups}, which leaves {slots} of {heads} query heads to each, but {queries} "
            f"share one in the model: give --num-attention-heads {groups * queries}, or another --num-query-groups"
        )


def _multiples(unit: int, size: int) -> str:
    """Name the multiples next to a size that is none."""
    lower = size // unit * unit
    return f"{lower} or {lower + unit}" if lower > unit else str(2 * unit)


def head_origins(growth: Growth) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Return for each key-value head of the larger model which one it copies, and which of its query heads it gets.

    A key-value head may be copied several times; its query heads are dealt out to the copies in turn, so that each is
    there at least once.

    Returns:
        Per key-value head: its origin, and the numbers of its query heads within the origin's.
    """
    source, target = growth.source, growth.target
    queries = source.num_attention_heads // source.query_groups
    slots = target.num_attention_heads // target.query_groups
    origins = []
    for group in range(target.query_groups):
        origin, copy = group % source.query_groups, group // source.query_groups
        origins.append((origin, tuple((copy * slots + slot) % queries for slot in range(slots))))
    return tuple(origins)
