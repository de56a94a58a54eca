"""What a cache may hold: as many texts as fit into its memory, and beginnings of earlier ones, alike on all ranks."""

from collections.abc import Sequence

from megatron_7b.errors import ConfigError
from megatron_7b.generation.decoder_runner import DecoderRunner
from megatron_7b.generation.prefixes import BLOCK, PrefixCache
from megatron_7b.generation.requests import GenerationRequest
from megatron_7b.generation.runner import ModelRunner


class CacheRoom:
    """The room of a runner's cache.

    All rows are as long as the longest text may become, so a long text takes room from every other.

    Args:
        runner: Whose cache it is.
        max_bytes: Memory that the cache may take on this rank, what a resize takes for a moment included. The rank with
            the least room decides for all: ranks may differ in their layers, and must admit the same texts.
        keeps_prefixes: Keep what texts begin with where texts that run leave room, for others that begin alike.

    Raises:
        ConfigError: There is no room for a token, or prefixes are to be kept of a model that reads prompts as a whole.

    **Collective:** all ranks.
    """

    def __init__(self, runner: ModelRunner, max_bytes: int, *, keeps_prefixes: bool = False) -> None:
        self._runner = runner
        self.max_tokens = runner.least(runner.tokens_within(max_bytes))
        """Tokens, all rows together."""
        if self.max_tokens < 1:
            raise ConfigError(
                f"max_cache_bytes is {max_bytes:,}, which is less than the keys and values of a token take",
                hint="a cache has room for at least one whole text",
            )
        self._prefixes: PrefixCache | None = None
        if keeps_prefixes:
            if not isinstance(runner, DecoderRunner):
                raise ConfigError("the model encodes each prompt as a whole, so its beginning cannot be kept")
            self._prefixes = PrefixCache(runner)

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens that are kept."""
        return 0 if self._prefixes is None else self._prefixes.num_tokens

    def fits(self, requests: Sequence[GenerationRequest]) -> bool:
        """Whether these texts fit together."""
        return self.tokens_of(requests) <= self.max_tokens

    def tokens_of(self, requests: Sequence[GenerationRequest]) -> int:
        """Return the tokens that texts may come to take together."""
        return _num_rows(requests) * self._runner.positions_of(requests)

    def check(self, request: GenerationRequest) -> None:
        """Refuse a text that never fits.

        Raises:
            ConfigError: It does not.
        """
        if not self.fits([request]):
            rows = f"{request.num_rows} beams" if request.num_rows > 1 else "a text"
            raise ConfigError(
                f"{rows} of up to {self._runner.positions_of([request])} tokens do not fit into the cache, which has "
                f"room for {self.max_tokens} tokens",
                hint="shorten the prompt, ask for fewer tokens, or give the cache more memory",
            )

    def reserve(
        self, texts: Sequence[tuple[GenerationRequest, int]], prompts: Sequence[tuple[int, ...]]
    ) -> dict[tuple[int, ...], int]:
        """Make room for texts, to which prefixes give way.

        Args:
            texts: All of them, running and new, each with its tokens so far.
            prompts: Of the new ones.

        Returns:
            How many tokens of each prompt are kept and can be restored, at least one less than it has.
        """
        requests = [request for request, _ in texts]
        if self._prefixes is not None:
            for prompt in prompts:  # so these are the last ones to give way
                self._prefixes.find(prompt)
            self._prefixes.shrink(self.max_tokens - self.tokens_of(requests))
        self._runner.reserve(_num_rows(requests), texts)
        return {prompt: 0 if self._prefixes is None else self._prefixes.find(prompt) for prompt in prompts}

    def restore(self, prompt: Sequence[int], num_tokens: int, row: int) -> None:
        """Copy the first tokens of a prompt, as many as `reserve` has found, into a row of the cache."""
        if self._prefixes is not None and num_tokens:
            self._prefixes.restore(prompt, num_tokens, row)

    def keep(self, ids: Sequence[int], row: int, running: Sequence[GenerationRequest]) -> None:
        """Keep what a row of the cache begins with, if there is room beside the texts that run.

        Args:
            ids: Its tokens.
            row: The row.
            running: All texts that have rows.
        """
        if self._prefixes is None or len(ids) < BLOCK:
            return
        needed, held = self.tokens_of(running), self._runner.num_cached
        if held >= 2 * needed and self._prefixes.num_tokens + len(ids) > self.max_tokens - held:
            # What ended texts have left behind is worth less than what may be read again.
            self._prefixes.give_back(_num_rows(running), self._runner.positions_of(running))
            held = self._runner.num_cached
        self._prefixes.keep(ids, row, self.max_tokens - max(needed, held))

    def reserve_lanes(self, length: int, max_rows: int) -> int:
        """Let prefixes give way to rows of texts that are scored, and return how many fit.

        Args:
            length: Of the longest text. One row has as many positions, of several each has twice as many.
            max_rows: Rows that are wanted.

        Raises:
            ConfigError: Not even one.
        """
        if length > self.max_tokens:
            raise ConfigError(
                f"a text of {length} tokens does not fit into the cache, which has room for {self.max_tokens} tokens",
                hint="shorten the text, or give the cache more memory",
            )
        num_rows = max(1, min(max_rows, self.max_tokens // max(1, 2 * length)))
        if self._prefixes is not None:
            self._prefixes.shrink(self.max_tokens - (length if num_rows == 1 else num_rows * 2 * length))
        return num_rows


def _num_rows(requests: Sequence[GenerationRequest]) -> int:
    return sum(request.num_rows for request in requests)
