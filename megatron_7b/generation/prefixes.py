"""Beginnings of texts whose keys and values are kept: whoever begins alike is not read from the start again.

They are kept in blocks of tokens, each with the block before it as its parent: texts that begin alike share blocks. A
system prompt, the examples of a few-shot prompt, and what was said before in a conversation are read once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from megatron_7b.generation.decoder_runner import DecoderRunner

BLOCK = 32
"""Tokens of a block: what two texts share is found in steps of this many."""


@dataclass(eq=False)
class _Block:
    """Keys and values of some tokens, after those of the block before.

    Attributes:
        tokens: Which ones.
        parent: The block before; None: a text begins here.
        content: Keys and values of this rank, [2 × layers, g/tp, BLOCK, d].
        children: The blocks that come next, by their tokens.
    """

    tokens: tuple[int, ...]
    parent: "_Block | None"
    content: Tensor
    children: dict[tuple[int, ...], "_Block"] = field(default_factory=dict)


class PrefixCache:
    """Keeps beginnings of texts as long as there is room, and drops those that were not used for the longest time.

    What is kept follows from the tokens and the order of calls alone, so it is the same on all ranks of a model.

    Args:
        runner: Out of whose cache they come, and into which they go.
    """

    def __init__(self, runner: DecoderRunner) -> None:
        self._runner = runner
        self._first: dict[tuple[int, ...], _Block] = {}
        # In the order of their last use. A block is used with those before it, these last: so the first one of all is
        # a block that none comes after.
        self._by_use: dict[_Block, None] = {}

    @property
    def num_tokens(self) -> int:
        """Tokens that are kept."""
        return BLOCK * len(self._by_use)

    def give_back(self, num_rows: int, num_positions: int) -> None:
        """Give up room of the cache beyond these rows and positions."""
        self._runner.give_back(num_rows, num_positions)

    def find(self, ids: Sequence[int]) -> int:
        """Return how many tokens of a prompt are known, one less than all at most, and note their use."""
        return BLOCK * len(self._use(ids[:-1]))

    def restore(self, ids: Sequence[int], num_tokens: int, row: int) -> None:
        """Copy the first tokens of a prompt, as many as `find` returned, into a row of the cache."""
        for number, block in enumerate(self._use(ids[:num_tokens])):
            self._runner.copy_in(row, number * BLOCK, block.content)

    def keep(self, ids: Sequence[int], row: int, max_tokens: int) -> None:
        """Keep tokens whose keys and values a row of the cache begins with; what does not fit is left out.

        Args:
            ids: The tokens; of the last ones, only whole blocks are kept.
            row: Of the cache.
            max_tokens: How many may be kept in all; the oldest make room.
        """
        chain = self._use(ids)
        for tokens in _blocks_of(ids, first=len(chain)):
            while self.num_tokens + BLOCK > max_tokens and self._drop_oldest(but=chain):
                pass
            if self.num_tokens + BLOCK > max_tokens:
                break
            parent, start = chain[-1] if chain else None, BLOCK * len(chain)
            block = _Block(tokens, parent, self._runner.copy_out(row, slice(start, start + BLOCK)))
            self._children_of(parent)[tokens] = block
            self._by_use[block] = None
            chain.append(block)
        self._note(chain)

    def shrink(self, max_tokens: int) -> None:
        """Drop the oldest until no more than this many tokens are kept."""
        while self.num_tokens > max_tokens and self._drop_oldest():
            pass

    def _use(self, ids: Sequence[int]) -> list[_Block]:
        """Return the blocks that a text begins with, as far as they are known, and note their use."""
        found: list[_Block] = []
        for tokens in _blocks_of(ids):
            block = self._children_of(found[-1] if found else None).get(tokens)
            if block is None:
                break
            found.append(block)
        self._note(found)
        return found

    def _note(self, chain: Sequence[_Block]) -> None:
        """Note that blocks were used, the last one first."""
        for block in reversed(chain):
            self._by_use.pop(block, None)
            self._by_use[block] = None

    def _drop_oldest(self, but: Sequence[_Block] = ()) -> bool:
        """Drop the block that was not used for the longest time, unless it is one of some; returns whether it was."""
        oldest = next(iter(self._by_use), None)
        if oldest is None or oldest in but:
            return False
        del self._by_use[oldest]
        del self._children_of(oldest.parent)[oldest.tokens]
        return True

    def _children_of(self, block: _Block | None) -> dict[tuple[int, ...], _Block]:
        return self._first if block is None else block.children


def _blocks_of(ids: Sequence[int], first: int = 0) -> Iterator[tuple[int, ...]]:
    """Yield the whole blocks of a text, from one of them on."""
    for start in range(first * BLOCK, len(ids) - BLOCK + 1, BLOCK):
        yield tuple(ids[start : start + BLOCK])
