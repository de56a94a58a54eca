"""A key-value cache whose rows stand at positions of their own, under megatron-core's stock attention layers.

megatron-core 0.19's own contexts do not fit: the static one holds all rows at one position and rotates every cached
key again for each token, the dynamic one needs FlashAttention. Here keys are stored rotated, in the core attention: the
part of SelfAttention that a layer spec may choose.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor, nn

from megatron_7b.model.windowed_attention import attend_within_window
from megatron_7b.runtime.cpu import attention as cpu_attention

_GROWTH = 1.5


@dataclass(frozen=True)
class Placement:
    """Where the tokens of one forward pass stand.

    Attributes:
        first_row: The pass is over rows [first_row, first_row + b) of the cache.
        starts: Position of the first token of each row, on the host.
        positions: The position of every token, int64 [b, s].
        reach: How many positions the keys are read of, whatever the positions are; `starts` is empty then, and the
            shape of what is computed follows from nothing on the host. None: as many as the tokens see.
    """

    first_row: int
    starts: tuple[int, ...]
    positions: Tensor
    reach: int | None = None

    @property
    def rows(self) -> slice:
        """The rows of the cache."""
        return slice(self.first_row, self.first_row + self.positions.shape[0])

    @property
    def num_positions(self) -> int:
        """Positions that the keys reach to, s_k."""
        return max(self.starts) + self.positions.shape[1] if self.reach is None else self.reach

    @property
    def is_aligned(self) -> bool:
        """Whether all rows are known to stand at the same position."""
        return self.reach is None and min(self.starts) == max(self.starts)

    def first_seen(self, window: int | None) -> int:
        """Return the oldest position that any token sees, if each sees as many as its window has; None: all."""
        return 0 if window is None or self.reach is not None else max(0, min(self.starts) - window + 1)


def place(first_row: int, starts: Sequence[int], num_tokens: int, device: torch.device) -> Placement:
    """Return the placement of `num_tokens` tokens per row from the given positions on."""
    offsets = torch.arange(num_tokens, device=device)
    positions = torch.tensor(list(starts), device=device)[:, None] + offsets
    return Placement(first_row, tuple(starts), positions)


def visible_keys(placement: Placement, window: int | None = None) -> Tensor | None:
    """Return which keys each query may see, or None where the causal rule says it all.

    A query sees its own position and all before it, or those of them in its window. What comes after it in the cache is
    of a longer row, or left over.

    Args:
        placement: Where the queries stand.
        window: Keys that a query sees, its own included; None: all.

    Returns:
        Boolean [b, 1, s, s_k] over the keys from `Placement.first_seen` on, or None: either nothing precedes the
        queries, or a single one per row sees all these keys.
    """
    s, first = placement.positions.shape[1], placement.first_seen(window)
    if placement.is_aligned and (s == 1 or placement.starts[0] == 0):
        return None
    keys = torch.arange(first, placement.num_positions, device=placement.positions.device)
    queries = placement.positions[:, None, :, None]
    return keys <= queries if window is None else (keys <= queries) & (keys > queries - window)


class KeyValueCache:
    """Keys and values of this rank's attention layers; grows with what is reserved.

    Args:
        num_layers: Attention layers of this rank.
        num_query_groups: Key-value heads of this rank, g/tp.
        head_width: Channels d of one head.
        dtype: Of keys and values.
        device: Where they lie.

    Attributes:
        num_resizes: How often keys and values have moved to other tensors.
    """

    def __init__(
        self, num_layers: int, num_query_groups: int, head_width: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        # Zeros, not empty memory: a masked key of NaN would still make its whole row NaN.
        self._keys = [
            torch.zeros(0, num_query_groups, 0, head_width, dtype=dtype, device=device) for _ in range(num_layers)
        ]
        self._values = [torch.zeros_like(keys) for keys in self._keys]
        self._num_rows = self._num_positions = self.num_resizes = 0
        self._most_positions: int | None = None
        self._placement: Placement | None = None
        self._masks: dict[int | None, Tensor | None] = {}

    @property
    def num_bytes(self) -> int:
        """Memory that is held."""
        return sum(block.nbytes for block in (*self._keys, *self._values))

    @property
    def num_tokens(self) -> int:
        """Tokens that there is room for, all rows together."""
        return self._num_rows * self._num_positions

    @property
    def num_positions(self) -> int:
        """Positions of each row."""
        return self._num_positions

    def tokens_within(self, max_bytes: int) -> int:
        """Return how many tokens fit into this much memory, while the cache is resized too.

        A resize copies block by block, the keys or the values of a layer: what is old and what is new together are
        never more than the larger of both and one block.
        """
        blocks = [*self._keys, *self._values]
        widths = [block.shape[1] * block.shape[3] * block.element_size() for block in blocks]
        return max_bytes // (sum(widths) + max(widths))

    def reserve(self, num_rows: int, num_positions: int, most_positions: int | None = None) -> None:
        """Make room for the rows in use and for positions, keeping what they have.

        What is allocated is never more than these rows times the most positions that one of them may come to have:
        rows and positions that ended texts have left behind are given back.

        Args:
            num_rows: All rows that are in use, or will be.
            num_positions: Of each, for now.
            most_positions: That the longest may come to have; None: as it was said before, or unlimited.
        """
        if most_positions is not None:
            self._most_positions = most_positions
        if num_rows <= self._num_rows and num_positions <= self._num_positions:
            return
        positions = self._num_positions
        if num_positions > positions:
            positions = max(num_positions, int(positions * _GROWTH))
        if self._most_positions is not None:
            positions = max(num_positions, min(positions, self._most_positions))
        self.resize(num_rows, positions)

    def resize(self, num_rows: int, num_positions: int) -> None:
        """Have these rows and positions exactly, keeping of what there is as much as finds room."""
        rows, kept = min(num_rows, self._num_rows), min(num_positions, self._num_positions)
        for blocks in (self._keys, self._values):
            for layer, old in enumerate(blocks):
                new = old.new_zeros(num_rows, old.shape[1], num_positions, old.shape[3])
                new[:rows, :, :kept] = old[:rows, :, :kept]
                blocks[layer] = new
        self._num_rows, self._num_positions = num_rows, num_positions
        self.num_resizes += 1

    def begin(self, placement: Placement) -> None:
        """Announce where the tokens of the next forward pass stand; the room for them is reserved."""
        assert placement.rows.stop <= self._num_rows, "rows were not reserved"
        assert placement.num_positions <= self._num_positions, "positions were not reserved"
        self._placement = placement
        self._masks = {}

    @property
    def is_aligned(self) -> bool:
        """Whether all rows of the pass stand at the same position."""
        return self._placement is not None and self._placement.is_aligned

    def aligned_rows(self, window: int | None) -> list[tuple[slice, int]]:
        """Return rows of the pass that stand at the same position, and how many of the keys of `append` they have."""
        assert self._placement is not None, "a forward pass has begun"
        starts = self._placement.starts
        first = self._placement.first_seen(window)
        ends = [start + self._placement.positions.shape[1] - first for start in starts]
        if self._placement.is_aligned:
            return [(slice(None), ends[0])]
        return [(slice(row, row + 1), end) for row, end in enumerate(ends)]

    def mask(self, window: int | None) -> Tensor | None:
        """Return `visible_keys` of the pass, which layers with the same window share."""
        if window not in self._masks:
            assert self._placement is not None, "a forward pass has begun"
            self._masks[window] = visible_keys(self._placement, window)
        return self._masks[window]

    def append(self, layer: int, key: Tensor, value: Tensor, window: int | None = None) -> tuple[Tensor, Tensor]:
        """Store the keys and values of one layer and return all that its queries may see.

        Args:
            layer: Attention layer of this rank, from 0.
            key: [s, b, g/tp, d], rotated.
            value: [s, b, g/tp, d].
            window: Keys that a query sees, its own included; None: all.

        Returns:
            Keys and values [b, g/tp, s_k, d], views of the cache.
        """
        placement = self._placement
        assert placement is not None, "a forward pass has begun"
        seen = []
        for block, new in ((self._keys[layer], key), (self._values[layer], value)):
            rows = block[placement.rows]
            if placement.is_aligned:
                start = placement.starts[0]
                rows[:, :, start : start + new.shape[0]] = new.permute(1, 2, 0, 3)
            else:
                row_numbers = torch.arange(len(placement.positions), device=new.device)
                rows[row_numbers[:, None], :, placement.positions] = new.transpose(0, 1)
            seen.append(rows[:, :, placement.first_seen(window) : placement.num_positions])
        return seen[0], seen[1]

    def stored(self, layer: int, rows: slice, num_positions: int) -> tuple[Tensor, Tensor]:
        """Return the first keys and values of rows [b, g/tp, num_positions, d], views of the cache."""
        return self._keys[layer][rows, :, :num_positions], self._values[layer][rows, :, :num_positions]

    def blocks(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return all keys and values of one layer, [rows, g/tp, positions, d]: the cache itself."""
        return self._keys[layer], self._values[layer]

    def copy_out(self, row: int, positions: slice) -> Tensor:
        """Return a copy of some positions of a row, [2 × layers, g/tp, s, d]: keys of all layers, then values."""
        return torch.stack([block[row, :, positions] for block in (*self._keys, *self._values)])

    def copy_in(self, row: int, start: int, content: Tensor) -> None:
        """Put what `copy_out` returned into a row, from a position on."""
        for block, of_block in zip((*self._keys, *self._values), content, strict=True):
            block[row, :, start : start + content.shape[2]] = of_block

    def copy_rows(self, copies: Sequence[tuple[int, int]], positions: slice) -> None:
        """Copy positions of rows to others, in all layers.

        Args:
            copies: Pairs of (source, target); no target is a source.
            positions: Which positions.
        """
        if len(copies) == 1:  # without the temporary copy that an index makes
            (source, target), *_ = copies
            for block in (*self._keys, *self._values):
                block[target, :, positions] = block[source, :, positions]
            return
        device = self._keys[0].device
        sources, targets = torch.tensor(copies, device=device).unbind(1)
        for block in (*self._keys, *self._values):
            block[targets, :, positions] = block[sources, :, positions]


class CachedAttention(nn.Module):
    """Core attention over the cache: appends its keys and values, then attends to all that a query may see.

    Args:
        cache: Shared by the layers.
        layer: Attention layer of this rank, from 0.
        softmax_scale: Factor of the scores; None means 1/sqrt(d).
        window: Keys that a query sees, its own included; None: all.
    """

    def __init__(
        self, cache: KeyValueCache, layer: int, softmax_scale: float | None, window: int | None = None
    ) -> None:
        super().__init__()
        self._window = window
        self._cache = cache
        self._layer = layer
        self._softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attention_bias: Tensor | None = None,
        **_unused: Any,
    ) -> Tensor:
        """Attend causally.

        Args:
            query: [s, b, n/tp, d], rotated.
            key: [s, b, g/tp, d], rotated.
            value: [s, b, g/tp, d].
            attention_mask: Must be None: what is visible follows from the positions.
            attention_bias: Added to the scores of single tokens, [b, n/tp, 1, s_k], very low where a key is hidden.
                None: nothing is added.

        Returns:
            [s, b, n/tp × d].
        """
        assert attention_mask is None
        s, b, n, d = query.shape
        keys, values = self._cache.append(self._layer, key, value, self._window)
        assert attention_bias is None or (s == 1 and n == keys.shape[1])
        if s == 1:
            mask = self._cache.mask(self._window) if attention_bias is None else attention_bias
            # The queries of a group share their keys: they take the place of the sequence, and no key is repeated.
            q = query.reshape(b, keys.shape[1], n // keys.shape[1], d)
            context = functional.scaled_dot_product_attention(q, keys, values, mask, scale=self._softmax_scale)
            return context.reshape(1, b, n * d)
        return self._attend_to_many(query, keys, values).flatten(2)

    def _attend_to_many(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attend from several tokens of each row [s, b, n/tp, d] to keys [b, g/tp, s_k, d]; the shape of the query."""
        keys_and_values = keys.permute(2, 0, 1, 3), values.permute(2, 0, 1, 3)
        if cpu_attention.is_supported(query, *keys_and_values, causal=True, scale=self._softmax_scale):
            of_rows = [
                cpu_attention.attention(
                    query[:, rows],
                    *(x[:num_seen, rows] for x in keys_and_values),
                    causal=True,
                    window=self._window,
                    scale=self._softmax_scale,
                )
                for rows, num_seen in self._cache.aligned_rows(self._window)
            ]
            return of_rows[0] if len(of_rows) == 1 else torch.cat(of_rows, dim=1)
        queries = query.permute(1, 2, 0, 3)
        if self._window is not None and self._cache.is_aligned:
            context = attend_within_window(queries, keys, values, self._window, scale=self._softmax_scale)
        else:
            mask = self._cache.mask(self._window)
            context = functional.scaled_dot_product_attention(
                queries,
                keys,
                values,
                mask,
                is_causal=mask is None,
                scale=self._softmax_scale,
                enable_gqa=query.shape[2] != keys.shape[1],
            )
        return context.permute(2, 0, 1, 3)


def attention_layers(layers: Iterable[nn.Module]) -> list[SelfAttention]:
    """Return the attention layers of a stack, in order."""
    attentions = (getattr(layer, "self_attention", None) for layer in layers)
    return [attention for attention in attentions if isinstance(attention, SelfAttention)]
