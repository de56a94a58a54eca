"""An encoder-decoder: a prompt is encoded once, and each layer of the decoder keeps the keys and values made of it."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as functional
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor, nn

from megatron_7b.errors import ConfigError
from megatron_7b.generation.cache import CachedAttention, KeyValueCache, attention_layers, place
from megatron_7b.generation.requests import GenerationRequest
from megatron_7b.generation.runner import TOKENS_AHEAD, ModelRunner
from megatron_7b.model.kinds.encoder_decoder.network import EncoderDecoderModel


class EncoderDecoderRunner(ModelRunner):
    """Runs this rank's share of a model without pipeline stages.

    Args:
        model: The model, without sequence parallelism.
        decoder_start_id: Token that the decoder begins with.

    Raises:
        ConfigError: the model cannot be used for generation as it was built, or has no such token.
    """

    def __init__(self, model: EncoderDecoderModel, decoder_start_id: int | None) -> None:
        if model.config.sequence_parallel:
            raise ConfigError("the model was built with sequence parallelism: one token cannot be shared among ranks")
        if decoder_start_id is None or not 0 <= decoder_start_id < model.true_vocab_size:
            raise ConfigError(
                f"the decoder begins with token {decoder_start_id}, expected one of {model.true_vocab_size}",
                hint="decoder_start_token_id of generation_config.json says it, or else the tokenizer's <pad>",
            )
        super().__init__(model, model.pg_collection, has_logits=True)
        self._model = model
        self._start_id = decoder_start_id
        layers = model.decoder.layers
        attentions = attention_layers(layers)
        shape = (
            len(attentions),
            attentions[0].num_query_groups_per_partition,
            attentions[0].hidden_size_per_attention_head,
        )
        parameter = next(model.parameters())
        self._cache, self._sources = (
            KeyValueCache(*shape, dtype=parameter.dtype, device=self.device) for _ in range(2)
        )
        self._source_lengths: list[int] = []  # of the prompt in each row
        self._crossings = [
            _CachedSource(self._sources, layer, attention.cross_attention, model.config.softmax_scale)
            for layer, attention in enumerate(layers)
        ]
        self._originals = [(attention, attention.core_attention) for attention in attentions]
        for layer, attention in enumerate(attentions):
            attention.core_attention = CachedAttention(self._cache, layer, model.config.softmax_scale)

    def close(self) -> None:
        """Give the layers their own attention back. Collective: none."""
        for attention, original in self._originals:
            attention.core_attention = original
        for crossing in self._crossings:
            crossing.restore()

    @property
    def vocab_size(self) -> int:
        """Tokens that the model knows."""
        return self._model.true_vocab_size

    def context_of(self, prompt_ids: Sequence[int]) -> tuple[int, ...]:  # noqa: ARG002 - it is another text
        """Return what the decoder begins with, whatever the prompt is."""
        return (self._start_id,)

    def positions_of(self, requests: Iterable[GenerationRequest]) -> int:
        """Return the tokens of the longest prompt and of the longest text, which are in a cache each."""
        given = list(requests)
        return _longest_source(given) + _longest_text(given)

    @property
    def num_cached(self) -> int:
        """Tokens that both caches have room for."""
        return self._cache.num_tokens + self._sources.num_tokens

    def tokens_within(self, max_bytes: int) -> int:
        """Return how many tokens fit into memory; those of both caches take the same."""
        return self._cache.tokens_within(max_bytes)

    def reserve(self, num_rows: int, texts: Iterable[tuple[GenerationRequest, int]]) -> None:
        """Make room for prompts in one cache, and for new tokens in another."""
        given = list(texts)
        requests = [request for request, _ in given]
        source, text = _longest_source(requests), _longest_text(requests)
        ahead = max(min(length + TOKENS_AHEAD, _longest_text([request])) for request, length in given)
        rooms = ((self._sources, source, source), (self._cache, ahead, text))
        in_the_end = sum(max(cache.num_tokens, num_rows * most) for cache, _, most in rooms)
        if in_the_end > max(self.num_cached, num_rows * (source + text)):
            # One would grow, while the other has what ended texts have left behind.
            for cache, num_positions, most in rooms:
                if cache.num_tokens > num_rows * most:
                    cache.resize(num_rows, num_positions)
        for cache, num_positions, most in rooms:
            cache.reserve(num_rows, num_positions, most)
        self._source_lengths += [0] * (num_rows - len(self._source_lengths))

    def read(self, prompts: Sequence[Sequence[int]], first_row: int, starts: Sequence[int]) -> Tensor | None:
        """Encode prompts of any lengths in one pass, and decode the first token."""
        assert not any(starts), "a prompt is encoded as a whole"
        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths)
        ids = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=self.device)
        self._source_lengths[first_row : first_row + len(prompts)] = lengths
        states = self._model.encode(ids, _mask(lengths, self.device))
        self._sources.begin(place(first_row, [0] * len(prompts), longest, self.device))
        for crossing in self._crossings:
            crossing.keep(states)
        return self._decode([self._start_id] * len(prompts), first_row, [0] * len(prompts))

    def advance(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor | None:
        """Decode a token of each row."""
        self._cache.reserve(len(tokens), max(positions) + 1)
        return self._decode(tokens, 0, positions)

    def copy_rows(self, copies: Sequence[tuple[int, int]], positions: slice) -> None:
        """Copy keys and values, those of prompts as well if the rows do not have the same one yet."""
        self._cache.copy_rows(copies, positions)
        if positions.start == 0:
            self._sources.copy_rows(copies, slice(0, max(self._source_lengths[source] for source, _ in copies)))
            for source, target in copies:
                self._source_lengths[target] = self._source_lengths[source]

    def _decode(self, tokens: Sequence[int], first_row: int, positions: Sequence[int]) -> Tensor:
        """Append a token to each of the rows [first_row, first_row + b); returns logits [b, v].

        **Collective:** the tensor-parallel group.
        """
        model = self._model
        placement = place(first_row, positions, 1, self.device)
        self._cache.begin(placement)
        lengths = self._source_lengths[placement.rows]
        mask = _mask(lengths, self.device)
        for crossing in self._crossings:
            crossing.begin(placement.rows, max(lengths), mask)
        # The scores' bias for the distance of each key from its query, [b, n/tp, 1, s_k].
        distances = torch.arange(placement.num_positions, device=self.device) - placement.positions
        bias = model.decoder_relative_pos_emb.of_distances(distances).permute(0, 2, 1)[:, :, None]
        bias = bias.masked_fill((distances > 0)[:, None, None], torch.finfo(bias.dtype).min)
        ids = torch.tensor(tokens, device=self.device)[:, None]
        nothing = bias.new_empty(0, len(tokens), model.config.hidden_size)  # the layers have what is made of prompts
        logits = model.logits(model.decode(ids, nothing, attention_bias=bias)[0])
        gathered: Tensor = gather_from_tensor_model_parallel_region(logits, group=self._groups.tp)
        return gathered


def _longest_source(requests: Sequence[GenerationRequest]) -> int:
    return max((len(request.prompt_ids) for request in requests), default=0)


def _longest_text(requests: Sequence[GenerationRequest]) -> int:
    """Return the tokens of the longest text, with what the decoder begins with."""
    return 1 + max((request.max_new_tokens for request in requests), default=0)


def _mask(lengths: Sequence[int], device: torch.device) -> Tensor | None:
    """Return where texts filled up to one length are text, [b, s]; None: everywhere."""
    longest = max(lengths)
    if min(lengths) == longest:
        return None
    return torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]


class _CachedSource(nn.Module):
    """Core attention of a layer to a prompt, whose keys and values are computed once.

    Args:
        cache: Of the prompts, shared by the layers.
        layer: From 0.
        attention: megatron-core's cross-attention, which uses this until `restore`.
        softmax_scale: Factor of the scores; None means 1/sqrt(d).
    """

    def __init__(self, cache: KeyValueCache, layer: int, attention: Any, softmax_scale: float | None) -> None:
        super().__init__()
        self._cache = cache
        self._layer = layer
        self._softmax_scale = softmax_scale
        self._seen: tuple[slice, int, Tensor | None] = (slice(0), 0, None)
        self._restored = (attention, attention.core_attention, attention.linear_kv)
        attention.core_attention, attention.linear_kv = self, _NoKeys(attention.linear_kv)

    def restore(self) -> None:
        """Give the cross-attention back what it had."""
        attention, core_attention, linear_kv = self._restored
        attention.core_attention, attention.linear_kv = core_attention, linear_kv

    def keep(self, states: Tensor) -> None:
        """Compute and store keys and values of prompts, [s, b, h], in the rows that the cache has been told."""
        attention, _, linear_kv = self._restored
        mixed = linear_kv(states)[0]
        heads, width = attention.num_attention_heads_per_partition, attention.hidden_size_per_attention_head
        key, value = mixed.view(*mixed.shape[:2], heads, 2 * width).chunk(2, dim=-1)
        self._cache.append(self._layer, key, value)

    def begin(self, rows: slice, num_positions: int, mask: Tensor | None) -> None:
        """Announce which prompts the next pass attends to: rows of the cache, and where these have text [b, s_k]."""
        self._seen = (rows, num_positions, None if mask is None else mask[:, None, None])

    def forward(self, query: Tensor, *_keys_and_values: Any, **_unused: Any) -> Tensor:
        """Attend to the prompts.

        Args:
            query: [1, b, n/tp, d].

        Returns:
            [1, b, n/tp × d].
        """
        rows, num_positions, mask = self._seen
        keys, values = self._cache.stored(self._layer, rows, num_positions)
        context = functional.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3), keys, values, mask, scale=self._softmax_scale
        )
        return context.permute(2, 0, 1, 3).flatten(2)


class _NoKeys(nn.Module):
    """Stands in for the layer that makes keys and values, and makes none.

    Args:
        linear_kv: That layer.
    """

    def __init__(self, linear_kv: Any) -> None:
        super().__init__()
        self._width: int = linear_kv.output_size_per_partition

    def forward(self, states: Tensor) -> tuple[Tensor, None]:
        """Return no key and value for no state, [0, b, 2 × n/tp × d]."""
        return states.new_empty(*states.shape[:2], self._width), None
