"""What was measured of a model, and what of it is kept for that. NumPy only."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megatron_7b.compression.pruning.plan import PruningPlan

type Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """What calibration text has shown, the same at every layout.

    Attributes:
        loss: On that text, nats per token.
        cosine_distances: [layers + 1, layers + 1]; entry (i, j), averaged over tokens: 1 minus the cosine between the
            residual stream before layer i and before layer j (after the last one, for j = layers).
        angular_distances: The same with the angle, as a share of half a turn.
        units: [layers, f]: of each neuron of each MLP.
        heads: [layers, n]: of each query head.
        channels: [h]: of each channel of the residual stream, over all layers.
        energies: [2 × layers + 1, h]: mean square of each channel before each norm, in the order of the forward pass.
    """

    loss: float
    cosine_distances: Floats
    angular_distances: Floats
    units: Floats
    heads: Floats
    channels: Floats
    energies: Floats


@dataclass(frozen=True)
class LayerChoice:
    """A layer, or a block of layers, that could have been removed.

    Attributes:
        layers: From 0.
        score: What removing them is judged to cost.
    """

    layers: tuple[int, ...]
    score: float


@dataclass(frozen=True)
class Kept:
    """What of a model is kept, all in its order.

    Attributes:
        layers: Layers.
        units: Of each layer of the smaller model: neurons of the MLP.
        groups: Of each layer of the smaller model: key-value heads, each with its query heads, counted in the group.
        channels: Of the residual stream.
        norm_factors: Of each norm of the model, in the order of the forward pass: what its weights are multiplied by.
        candidates: How layers were judged.
    """

    layers: tuple[int, ...]
    units: tuple[NDArray[np.int64], ...]
    groups: tuple[tuple[tuple[int, tuple[int, ...]], ...], ...]
    channels: NDArray[np.int64]
    norm_factors: Floats
    candidates: tuple[LayerChoice, ...] = ()
    removed: tuple[int, ...] = field(default=())


def choose(plan: PruningPlan, scores: Scores, losses: Mapping[tuple[int, ...], float] | None = None) -> Kept:
    """Decide what is kept.

    Args:
        plan: The sizes.
        scores: Of the model.
        losses: Loss without layers, by these; for the depth score `perplexity`.
    """
    source, target = plan.source, plan.target
    candidates = judge_layers(plan, scores, losses)
    removed = removed_layers(plan, candidates)
    layers = tuple(layer for layer in range(source.num_layers) if layer not in removed)
    channels = largest(scores.channels, target.hidden_size)
    queries = target.num_attention_heads // target.query_groups
    groups = tuple(
        _kept_groups(scores.heads[layer], source.query_groups, target.query_groups, queries) for layer in layers
    )
    return Kept(
        layers=layers,
        units=tuple(largest(scores.units[layer], target.ffn_hidden_size) for layer in layers),
        groups=groups,
        channels=channels,
        norm_factors=_norm_factors(scores.energies, channels),
        candidates=tuple(candidates),
        removed=removed,
    )


def layer_candidates(plan: PruningPlan) -> list[tuple[int, ...]]:
    """Return what may be removed: blocks of layers, or single ones of which several are taken."""
    if not plan.scores_depth:
        return []
    size = plan.num_removed if plan.options.is_contiguous else 1
    return [tuple(range(first, first + size)) for first in range(plan.source.num_layers - size + 1)]


def judge_layers(
    plan: PruningPlan, scores: Scores, losses: Mapping[tuple[int, ...], float] | None
) -> list[LayerChoice]:
    """Give every candidate its score: the lower, the less it is missed."""
    if plan.options.depth_score == "perplexity":
        found = losses or {}
        return [LayerChoice(layers, found[layers]) for layers in layer_candidates(plan)]
    is_angle = plan.options.depth_score == "angular"
    distances = scores.angular_distances if is_angle else scores.cosine_distances
    return [LayerChoice(layers, float(distances[layers[0], layers[-1] + 1])) for layers in layer_candidates(plan)]


def removed_layers(plan: PruningPlan, candidates: Sequence[LayerChoice]) -> tuple[int, ...]:
    """Return the layers to remove, in their order; of equal ones the first."""
    if plan.options.drop_layers is not None:
        return tuple(sorted(plan.options.drop_layers))
    if not plan.num_removed:
        return ()
    best = sorted(candidates, key=lambda one: one.score)
    taken = 1 if plan.options.is_contiguous else plan.num_removed
    return tuple(sorted(layer for one in best[:taken] for layer in one.layers))


def largest(scores: Floats, count: int) -> NDArray[np.int64]:
    """Return the places of the `count` largest, in their order; of equal ones the first."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def _kept_groups(
    heads: Floats, num_groups: int, kept_groups: int, kept_queries: int
) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Keep the groups whose best query heads, as many as are kept, are worth most together."""
    by_group = heads.reshape(num_groups, -1)
    best = [largest(of_group, kept_queries) for of_group in by_group]
    worth = np.array([of_group[kept].sum() for of_group, kept in zip(by_group, best, strict=True)])
    return tuple((int(group), tuple(best[group].tolist())) for group in largest(worth, kept_groups))


def _norm_factors(energies: Floats, channels: NDArray[np.int64]) -> Floats:
    """Return what norms have to be multiplied by so that what is kept comes out of them as before.

    A norm divides by the root of the mean square. Of fewer channels that is another one: the share ρ of the sum of
    squares that is kept, over the share of the channels. The factor undoes it for the average of the calibration text.
    """
    if len(channels) == energies.shape[1]:
        return np.ones(len(energies))
    total = energies.sum(axis=1)
    share = np.divide(energies[:, channels].sum(axis=1), total, out=np.ones_like(total), where=total > 0)
    factors: Floats = np.sqrt(share * (energies.shape[1] / len(channels)))
    return factors


def perplexity(loss: float) -> float:
    """e^loss, infinite beyond a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
