"""Wider tensors that compute the same: copies share what the original gave to the layers after it.

A hidden unit or a head that is there several times computes the same several times, so each weight that reads it is
given to one of the copies, drawn at random, and is zero for the others. The sum keeps its terms, in any number format;
the weights keep the size that suits a wider layer; and copies get different gradients from the first step on. (Were the
weights divided in fixed shares, the gradients of the copies would be multiples of one another, which Adam makes equal:
the copies would stay copies.)

Source: Net2Net (Chen et al. 2016, arXiv 1511.05641), bert2BERT (Chen et al. 2022, arXiv 2110.07143) for copies; LEMON
(Wang et al. 2024, arXiv 2310.07999) for widths that are no multiples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_7b.conversion.growing.axes import Axis
from megatron_7b.conversion.growing.plan import Growth, head_origins
from megatron_7b.model.parameters import Arrangement, Parameter


@dataclass(frozen=True)
class Copies:
    """Channels of which some are there several times.

    Attributes:
        source: int64 [new]: which channel each one is a copy of.
        number: int64 [new]: how many copies of it come before.
        counts: int64 [old]: how often each one is there.
    """

    source: Tensor
    number: Tensor
    counts: Tensor

    @classmethod
    def of(cls, source: Sequence[int], num_sources: int) -> "Copies":
        """Count the copies in a list of sources."""
        counts, number = [0] * num_sources, []
        for channel in source:
            number.append(counts[channel])
            counts[channel] += 1
        return cls(torch.tensor(source), torch.tensor(number), torch.tensor(counts))

    @classmethod
    def in_turn(cls, before: int, after: int) -> "Copies":
        """Repeat all channels from the first on until there are enough."""
        return cls.of([channel % before for channel in range(after)], before)

    def repeat(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """Return the tensor with its channels along `dim` repeated."""
        return tensor.index_select(dim, self.source)

    def share(self, matrix: Tensor, generator: torch.Generator) -> Tensor:
        """Return [out, new] of [out, old], each weight given to one copy of the channel that it reads."""
        if len(self.source) == len(self.counts):
            return matrix
        drawn = torch.randint(2**31, matrix.shape, generator=generator) % self.counts
        return self.repeat(matrix, 1) * (self.repeat(drawn, 1) == self.number)


class Stream(Protocol):
    """How the residual stream gets wider."""

    output_factor: float
    """What a tied output layer makes too large."""

    def written(self, tensor: Tensor, dim: int) -> Tensor:
        """Widen what is added to the stream along `dim`."""

    def read(self, matrix: Tensor, generator: torch.Generator, std: float) -> Tensor:
        """Widen what reads the normalised stream, [out, h]; fresh weights have the standard deviation."""

    def scale(self, weight: Tensor) -> Tensor:
        """Widen the weight of a norm, [h]."""

    def shift(self, bias: Tensor) -> Tensor:
        """Widen the bias of a norm, [h]."""


class Duplicated:
    """All channels equally often: mean and mean square, and so every norm, stay what they are."""

    def __init__(self, before: int, after: int) -> None:
        assert after % before == 0
        self._copies = Copies.in_turn(before, after)
        self.output_factor = after / before

    def written(self, tensor: Tensor, dim: int) -> Tensor:
        """Repeat what is written."""
        return self._copies.repeat(tensor, dim)

    def read(self, matrix: Tensor, generator: torch.Generator, std: float) -> Tensor:  # noqa: ARG002
        """Give each weight to one of the copies."""
        return self._copies.share(matrix, generator)

    def scale(self, weight: Tensor) -> Tensor:
        """Repeat it."""
        return self._copies.repeat(weight)

    def shift(self, bias: Tensor) -> Tensor:
        """Repeat it."""
        return self._copies.repeat(bias)


class Filled:
    """Further channels that a norm turns into zero: for RMSNorm zero, for LayerNorm the mean of all others.

    As they would lower the mean square (of the difference from the mean), everything is written larger by the root of
    the ratio of the widths, and every norm scales it down again, so that epsilon keeps its meaning. What is read of the
    further channels is multiplied by zero: those weights are fresh.
    """

    def __init__(self, before: int, after: int, *, by_mean: bool) -> None:
        self._added, self._by_mean = after - before, by_mean
        self.output_factor = self._factor = math.sqrt(after / before)

    def written(self, tensor: Tensor, dim: int) -> Tensor:
        """Append the mean, or zeros."""
        added = tensor.mean(dim, keepdim=True) if self._by_mean else torch.zeros_like(tensor.narrow(dim, 0, 1))
        sizes = [self._added if each == dim else -1 for each in range(tensor.dim())]
        return torch.cat([tensor, added.expand(sizes)], dim) * self._factor

    def read(self, matrix: Tensor, generator: torch.Generator, std: float) -> Tensor:
        """Append fresh weights."""
        fresh = torch.empty(matrix.shape[0], self._added).normal_(0.0, std, generator=generator)
        return torch.cat([matrix, fresh], 1)

    def scale(self, weight: Tensor) -> Tensor:
        """Undo the factor; the further channels get the mean weight."""
        return torch.cat([weight, weight.mean().expand(self._added)]) / self._factor

    def shift(self, bias: Tensor) -> Tensor:
        """Append zeros."""
        return torch.cat([bias, bias.new_zeros(self._added)])


class Widening:
    """Widens the tensors of one model.

    Args:
        growth: What it grows into.

    Attributes:
        output_factor: What the last norm must be divided by if the output layer is the embedding.
        is_exact_in_bf16: Whether all results are numbers of the original, or these divided by powers of two.
    """

    def __init__(self, growth: Growth) -> None:
        source, target = growth.source, growth.target
        self._stream: Stream
        if growth.duplicates_stream:
            self._stream = Duplicated(source.hidden_size, target.hidden_size)
        else:
            by_mean = source.traits.normalization == "LayerNorm"
            self._stream = Filled(source.hidden_size, target.hidden_size, by_mean=by_mean)
        self.output_factor = self._stream.output_factor if source.share_embeddings_and_output_weights else 1.0
        if source.scale_output_states:  # by the root of the width, which is another one now
            self.output_factor *= math.sqrt(source.hidden_size / target.hidden_size)
        self.is_exact_in_bf16 = growth.duplicates_stream and math.log2(self.output_factor).is_integer()
        self._units = Copies.in_turn(source.ffn_hidden_size, target.ffn_hidden_size)
        self._fresh_std = source.init_method_std
        self._heads = _HeadCopies(growth)

    def __call__(
        self, tensor: Tensor, parameter: Parameter, axes: tuple[Axis, ...], generator: torch.Generator
    ) -> Tensor:
        """Widen a tensor.

        Args:
            tensor: Of the smaller model, FP32.
            parameter: The tensor's row of the smaller model's table.
            axes: What its dimensions are.
            generator: Draws which copy gets a weight, and fresh weights.
        """
        for dim, axis in enumerate(axes):  # rows first: copies of a row share what they read in different ways
            match axis:
                case "written":
                    tensor = self._stream.written(tensor, dim)
                case "read":
                    tensor = self._stream.read(tensor, generator, parameter.std or self._fresh_std)
                case "scale":
                    tensor = self._stream.scale(tensor)
                case "shift":
                    tensor = self._stream.shift(tensor)
                case "units" if dim == 0:
                    halves = tensor.chunk(2 if parameter.arrangement == "gate_up" else 1)
                    tensor = torch.cat([self._units.repeat(half) for half in halves])
                case "heads" if dim == 0:
                    tensor = tensor.index_select(0, self._heads.rows(parameter.arrangement))
                case "units":
                    tensor = self._units.share(tensor, generator)
                case "heads":
                    tensor = self._heads.query_channels.share(tensor, generator)
                case "head":
                    tensor = tensor.index_select(dim, self._heads.queries)
                case "fixed":
                    pass
        return tensor


class _HeadCopies:
    """Which heads of the larger model are copies of which.

    Args:
        growth: What the model grows into.

    Attributes:
        queries: int64 [n]: the query head that each one is a copy of.
        query_channels: The same for the channels of all query heads.
    """

    def __init__(self, growth: Growth) -> None:
        source = growth.source
        self._width = source.head_width
        self._origins = head_origins(growth)
        self._per_group = source.num_attention_heads // source.query_groups
        heads = [origin * self._per_group + member for origin, members in self._origins for member in members]
        self.queries = torch.tensor(heads)
        self.query_channels = Copies.of(self._channels(heads), source.num_attention_heads * self._width)

    def rows(self, arrangement: Arrangement) -> Tensor:
        """Return which row each row of a projection to queries, keys or values is a copy of."""
        if arrangement == "plain":
            return self.query_channels.source
        queries = self._per_group if arrangement == "query_key_value" else 0
        blocks = []
        for origin, members in self._origins:
            of_group = (*(members if queries else ()), queries, queries + 1)
            blocks += [origin * (queries + 2) + block for block in of_group]
        return torch.tensor(self._channels(blocks))

    def _channels(self, blocks: list[int]) -> list[int]:
        return [block * self._width + channel for block in blocks for channel in range(self._width)]
