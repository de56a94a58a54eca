"""What a model is to be cut down to, and whether it can be. Imports no torch."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from megatron_7b.config.model_config import with_layer_windows
from megatron_7b.config.schema import ModelConfig
from megatron_7b.errors import ConfigError

type DepthScore = Literal["block_influence", "angular", "perplexity"]

DEPTH_SCORES: tuple[DepthScore, ...] = ("block_influence", "angular", "perplexity")


@dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """What a model is to become.

    Attributes:
        num_layers: Layers of the smaller model; None keeps the number.
        drop_layers: The layers to remove, from 0, chosen by the user instead of a score.
        depth_score: What a layer is judged by. `block_influence`: how much it turns the residual stream, as 1 minus the
            cosine. `angular`: the same as an angle, of whole blocks of layers. `perplexity`: the loss on the
            calibration text without it.
        contiguous: Remove layers that follow one another; None: as the score was published, which is contiguous for
            `angular` only.
        hidden_size: Width of the residual stream; None keeps it.
        ffn_hidden_size: Inner width of the MLPs; None keeps it.
        num_attention_heads: Query heads, each as wide as before; None keeps as many for each query group.
        num_query_groups: Key-value heads; None keeps as many query heads for each.
        overwrite: Replace an earlier output of this command.
    """

    num_layers: int | None = None
    drop_layers: tuple[int, ...] | None = None
    depth_score: DepthScore = "block_influence"
    contiguous: bool | None = None
    hidden_size: int | None = None
    ffn_hidden_size: int | None = None
    num_attention_heads: int | None = None
    num_query_groups: int | None = None
    overwrite: bool = False

    @property
    def is_contiguous(self) -> bool:
        """Whether layers are removed that follow one another."""
        return self.depth_score == "angular" if self.contiguous is None else self.contiguous


@dataclass(frozen=True)
class PruningPlan:
    """A model, the smaller one that it becomes, and how layers are chosen.

    Attributes:
        source: Shape of the model.
        target: Shape of the smaller model.
        options: What was asked for.
    """

    source: ModelConfig
    target: ModelConfig
    options: PruneOptions

    @property
    def scores_depth(self) -> bool:
        """Whether layers are to be judged."""
        return self.num_removed > 0 and self.options.drop_layers is None

    @property
    def num_removed(self) -> int:
        """Layers that are removed."""
        return self.source.num_layers - self.target.num_layers

    def describe(self) -> str:
        """Name what shrinks, in one line."""
        sizes = (
            ("num_layers", self.source.num_layers, self.target.num_layers),
            ("hidden_size", self.source.hidden_size, self.target.hidden_size),
            ("ffn_hidden_size", self.source.ffn_hidden_size, self.target.ffn_hidden_size),
            ("num_attention_heads", self.source.num_attention_heads, self.target.num_attention_heads),
            ("num_query_groups", self.source.query_groups, self.target.query_groups),
        )
        changes = [f"{name} {before} to {after}" for name, before, after in sizes if before != after]
        return ", ".join(changes) or "no size changes"


def plan_pruning(model: ModelConfig, options: PruneOptions) -> PruningPlan:
    """Decide what a model is cut down to.

    Args:
        model: The model.
        options: What it is to become.

    Raises:
        ConfigError: It cannot become that, or nothing is asked for; all reasons are listed, with the sizes that can be.
    """
    check_can_be_pruned(model)
    sizes = (options.num_layers, options.hidden_size, options.ffn_hidden_size, options.num_attention_heads)
    if all(size is None for size in (*sizes, options.num_query_groups, options.drop_layers)):
        raise ConfigError(
            "nothing is to be pruned",
            hint="give --num-layers, --hidden-size, --ffn-hidden-size, --num-attention-heads or --num-query-groups, "
            "each with the size that is to be left",
        )
    problems = [*_bad_layers(model, options), *_out_of_range(model, options)]
    if not problems:
        problems = [*_bad_heads(model, options)]
    if problems:
        raise ConfigError("the model cannot be pruned to that:\n  " + "\n  ".join(problems))
    return PruningPlan(model, _target(model, options), options)


def check_can_be_pruned(model: ModelConfig) -> None:
    """Refuse a model of another kind.

    Raises:
        ConfigError: It is no decoder, a mixture of experts, or has the head of a classifier.
    """
    if model.traits.kind != "decoder":
        raise ConfigError(
            f"model.architecture is {model.architecture}, of kind {model.traits.kind}: only decoders can be pruned"
        )
    if model.num_moe_experts is not None:
        raise ConfigError(f"model.num_moe_experts is {model.num_moe_experts}: mixtures of experts cannot be pruned")
    if model.has_head:
        raise ConfigError(
            f"model.head is {model.head}: a model with a head cannot be pruned, as it predicts no text to judge by",
            hint="prune the language model that it was made from, then fine-tune that",
        )


def _bad_layers(model: ModelConfig, options: PruneOptions) -> Iterator[str]:
    dropped = options.drop_layers
    if dropped is None:
        if options.num_layers not in (None, model.num_layers) and len(set(model.layer_windows)) > 1:
            yield (
                f"--num-layers is {options.num_layers}, but some layers have a window and others have not, which makes "
                "their scores hard to compare: name the layers yourself, with --drop-layers"
            )
        return
    if wrong := [str(layer) for layer in dropped if not 0 <= layer < model.num_layers]:
        yield f"--drop-layers has {', '.join(wrong)}, expected numbers from 0 to {model.num_layers - 1}"
    if len(set(dropped)) != len(dropped):
        yield "--drop-layers names a layer twice"
    if len(set(dropped)) >= model.num_layers:
        yield "--drop-layers names all layers"
    if options.num_layers is not None and options.num_layers != model.num_layers - len(dropped):
        yield (
            f"--num-layers is {options.num_layers}, but --drop-layers leaves {model.num_layers - len(dropped)}; "
            "give one of them"
        )


def _out_of_range(model: ModelConfig, options: PruneOptions) -> Iterator[str]:
    for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"):
        wanted = getattr(options, name)
        before = model.query_groups if name == "num_query_groups" else getattr(model, name)
        if wanted is not None and not 1 <= wanted <= before:
            yield f"--{name.replace('_', '-')} is {wanted}, expected 1 to {before}, which the model has"


def _bad_heads(model: ModelConfig, options: PruneOptions) -> Iterator[str]:
    heads, groups = _heads_and_groups(model, options)
    queries, width = model.num_attention_heads // model.query_groups, model.head_width
    if groups is None:
        wanted = options.num_attention_heads
        yield (
            f"--num-attention-heads is {wanted}, but {queries} query heads share a key-value head and are removed with "
            f"it: expected a multiple of {queries}, or give --num-query-groups as well"
        )
        return
    if heads % groups:
        yield f"--num-attention-heads is {heads}, expected a multiple of --num-query-groups, which is {groups}"
    elif heads // groups > queries:
        yield (
            f"--num-query-groups is {groups}, which leaves {heads // groups} query heads to each, but there are "
            f"{queries}: give --num-attention-heads {groups * queries} or less"
        )
    hidden = model.hidden_size if options.hidden_size is None else options.hidden_size
    if not model.traits.has_query_groups and not model.traits.has_wide_heads and heads * width != hidden:
        yield (
            f"--hidden-size is {hidden} with {heads} heads, but those of {model.architecture} share the hidden size "
            f"and stay {width} wide: expected a multiple of {width}, and one head for each {width}"
        )


def _heads_and_groups(model: ModelConfig, options: PruneOptions) -> tuple[int, int | None]:
    """Return both numbers; None if the query heads asked for are no whole groups."""
    heads, groups = options.num_attention_heads, options.num_query_groups
    queries = model.num_attention_heads // model.query_groups
    if heads is None:
        groups = model.query_groups if groups is None else groups
        return groups * queries, groups
    if groups is None:
        return heads, None if heads % queries else heads // queries
    return heads, groups


def _target(model: ModelConfig, options: PruneOptions) -> ModelConfig:
    heads, groups = _heads_and_groups(model, options)
    hidden = model.hidden_size if options.hidden_size is None else options.hidden_size
    follows = model.num_query_groups is None and groups == heads
    is_regular = model.kv_channels is None and hidden == heads * model.head_width
    num_layers = model.num_layers if options.num_layers is None else options.num_layers
    if options.drop_layers is not None:
        num_layers = model.num_layers - len(options.drop_layers)
    windows = [size for layer, size in enumerate(model.layer_windows) if layer not in (options.drop_layers or ())]
    return replace(
        with_layer_windows(model, windows),
        num_layers=num_layers,
        hidden_size=hidden,
        ffn_hidden_size=model.ffn_hidden_size if options.ffn_hidden_size is None else options.ffn_hidden_size,
        num_attention_heads=heads,
        num_query_groups=None if follows else groups,
        kv_channels=None if is_regular else model.head_width,
        # Channels that are left out were zero at best: the mean square is over fewer of them, and grows by as much. The
        # norms of queries and keys have the same epsilon, and as many channels as before.
        norm_epsilon=model.norm_epsilon * (1.0 if model.qk_layernorm else model.hidden_size / hidden),
    )
