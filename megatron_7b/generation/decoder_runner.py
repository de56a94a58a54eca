"""A decoder, one forward pass through all pipeline stages at a time."""

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from megatron_7b.errors import ConfigError
from megatron_7b.generation.cache import CachedAttention, KeyValueCache, Placement, attention_layers, place
from megatron_7b.generation.decoding import TokenDecoder, can_decode
from megatron_7b.generation.fixed_steps import FixedSteps
from megatron_7b.generation.requests import GenerationRequest
from megatron_7b.generation.runner import TOKENS_AHEAD, ModelRunner
from megatron_7b.model.kinds.decoder.network import LanguageModel
from megatron_7b.model.windowed_attention import window_of
from megatron_7b.runtime.cpu import kernels

_SHORT = 64
"""Tokens that may be filled up rather than read in a pass of their own, which would read all weights again."""


class DecoderRunner(ModelRunner):
    """Runs this rank's stage: receives hidden states from the previous stage and sends them to the next.

    Args:
        model: This rank's only chunk, with torch-native layers and without sequence parallelism.
        cuda_graphs: Append tokens in steps of fixed shapes where `takes_fixed_steps` says so.

    Raises:
        ConfigError: the model cannot be used for generation as it was built.
    """

    def __init__(self, model: LanguageModel, *, cuda_graphs: bool = True) -> None:
        _check(model)
        super().__init__(model, model.pg_collection, has_logits=bool(model.post_process))
        self._model = model
        self._is_first = bool(model.pre_process)
        self._is_last = bool(model.post_process)
        self._parameter = next(model.parameters())
        self._angles = torch.empty(0)
        self._attentions = attention_layers(model.decoder.layers)
        self._original_attentions = [attention.core_attention for attention in self._attentions]
        self._cache = KeyValueCache(
            len(self._attentions),
            self._attentions[0].num_query_groups_per_partition,
            self._attentions[0].hidden_size_per_attention_head,
            dtype=self._parameter.dtype,
            device=self.device,
        )
        self._decoder = TokenDecoder(model, self._cache) if can_decode(model) else None
        self._steps: FixedSteps | None = None
        if cuda_graphs and takes_fixed_steps(model):
            self._steps = FixedSteps(self._take_step, self.vocab_size, self.device)
        self._tensors_of_steps = self._angles, self._cache.num_resizes
        for layer, attention in enumerate(self._attentions):
            window = window_of(model.config, attention.layer_number)
            attention.core_attention = CachedAttention(self._cache, layer, model.config.softmax_scale, window)

    def close(self) -> None:
        """Give the layers their own attention back. Collective: none."""
        if self._steps is not None:
            self._steps.forget()
        for attention, original in zip(self._attentions, self._original_attentions, strict=True):
            attention.core_attention = original

    @property
    def vocab_size(self) -> int:
        """Tokens that the model knows."""
        return self._model.true_vocab_size

    def context_of(self, prompt_ids: Sequence[int]) -> tuple[int, ...]:
        """Return the prompt."""
        return tuple(prompt_ids)

    def positions_of(self, requests: Iterable[GenerationRequest]) -> int:
        """Return the tokens of the longest text with its prompt."""
        return max((len(request.prompt_ids) + request.max_new_tokens for request in requests), default=0)

    @property
    def num_cached(self) -> int:
        """Tokens that the cache has room for."""
        return self._cache.num_tokens

    def tokens_within(self, max_bytes: int) -> int:
        """Return how many tokens fit into memory."""
        return self._cache.tokens_within(max_bytes)

    def reserve(self, num_rows: int, texts: Iterable[tuple[GenerationRequest, int]]) -> None:
        """Make room for prompts and new tokens."""
        ahead, most = 0, 0
        for request, length in texts:
            known, end = max(length, len(request.prompt_ids)), self.positions_of([request])
            ahead, most = max(ahead, min(known + TOKENS_AHEAD, end)), max(most, end)
        self._cache.reserve(num_rows, ahead, most)

    def read(self, prompts: Sequence[Sequence[int]], first_row: int, starts: Sequence[int]) -> Tensor | None:
        """Read prompts of any lengths, those of similar length in one pass."""
        unread = [prompt[start:] for prompt, start in zip(prompts, starts, strict=True)]
        parts = []
        for begin, end in _passes([len(ids) for ids in unread], starts, self._cache.num_positions):
            longest = len(unread[end - 1])
            padded = [[*ids, *[0] * (longest - len(ids))] for ids in unread[begin:end]]
            last = [len(ids) - 1 for ids in unread[begin:end]]
            parts.append(self._logits_after(padded, first_row + begin, starts[begin:end], last))
        return torch.cat([part for part in parts if part is not None]) if self._is_last else None

    def advance(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor | None:
        """Append a token to each row."""
        self._cache.reserve(len(tokens), max(positions) + 1)
        if self._decoder is not None and len(tokens) <= kernels.MOST_ROWS:
            return self._decode(self._decoder, tokens, positions)
        if self._steps is not None:
            return self._fixed_step(self._steps, tokens, positions)
        return self._logits_after([[token] for token in tokens], 0, positions, [0] * len(tokens))

    def copy_rows(self, copies: Sequence[tuple[int, int]], positions: slice) -> None:
        """Copy keys and values."""
        self._cache.copy_rows(copies, positions)

    def copy_out(self, row: int, positions: slice) -> Tensor:
        """Return a copy of keys and values of a row, as `KeyValueCache.copy_out`."""
        return self._cache.copy_out(row, positions)

    def copy_in(self, row: int, start: int, content: Tensor) -> None:
        """Put what `copy_out` returned into a row, from a position on."""
        self._cache.copy_in(row, start, content)

    def give_back(self, num_rows: int, num_positions: int) -> None:
        """Keep room for these rows and as many positions at most."""
        self._cache.resize(num_rows, min(num_positions, self._cache.num_positions))

    def forward(self, tokens: Sequence[Sequence[int]], first_row: int, starts: Sequence[int]) -> Tensor | None:
        """Append tokens to rows of the cache, for which there must be room.

        Args:
            tokens: [b][s] token ids, filled up at the end.
            first_row: Rows [first_row, first_row + b) of the cache.
            starts: Position of each row's first token, [b].

        Returns:
            On the last stage the hidden states [s, b, h], after the final norm; None on the others.

        **Collective:** all ranks that hold the model.
        """
        device = self._parameter.device
        placement = place(first_row, starts, len(tokens[0]), device)
        self._cache.begin(placement)
        hidden = self._hidden_states(torch.tensor(tokens, device=device), placement)
        if not self._is_last:
            dist.send(hidden, group=self._groups.pp, group_dst=self._groups.pp.rank() + 1)
            return None
        return hidden

    def make_room(self, num_rows: int, num_positions: int, most_positions: int) -> None:
        """Reserve rows and positions of the cache for `forward`, as `KeyValueCache.reserve`."""
        self._cache.reserve(num_rows, num_positions, most_positions)

    def _logits_after(
        self, tokens: Sequence[Sequence[int]], first_row: int, starts: Sequence[int], last: Sequence[int]
    ) -> Tensor | None:
        """Append tokens as `forward` does; returns the logits [b, v] of what follows token `last` of each row."""
        hidden = self.forward(tokens, first_row, starts)
        if hidden is None:
            return None
        rows = torch.arange(len(last), device=hidden.device)
        return self.logits(hidden[torch.tensor(last, device=hidden.device), rows])

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the output layer.

        Args:
            hidden: [..., h], after the final norm.

        Returns:
            [..., v] over all tensor ranks' parts of the vocabulary, padding masked.

        **Collective:** the tensor-parallel group of the last stage.
        """
        model = self._model
        tied = model.share_embeddings_and_output_weights
        weight = model.shared_embedding_or_output_weight() if tied else None
        if self._decoder is not None and hidden.dim() == 2 and hidden.shape[0] <= kernels.MOST_ROWS:
            of_rank = kernels.product(hidden.contiguous(), model.output_layer.weight if weight is None else weight)
            logits: Tensor = gather_from_tensor_model_parallel_region(of_rank, group=self._groups.tp)
        else:
            logits = model.output_layer(hidden, weight=weight, runtime_gather_output=True)[0]
        model.mask_vocabulary_padding(logits)
        return logits

    def _decode(self, decoder: TokenDecoder, tokens: Sequence[int], positions: Sequence[int]) -> Tensor | None:
        """Append a token to each row, the short way; returns logits as `advance` does."""
        model = self._model
        if self._is_first:
            ids, places = torch.tensor([tokens, positions]).unsqueeze(2)
            hidden = model.embedding(input_ids=ids, position_ids=places)[0]
        else:
            hidden = self._parameter.new_empty(len(tokens), model.config.hidden_size)
            dist.recv(hidden, group=self._groups.pp, group_src=self._groups.pp.rank() - 1)
        angles = None
        if self._model.position_embedding_type == "rope":
            angles = self._angles_up_to(max(positions) + 1)[torch.tensor(positions)]
        hidden = decoder.run(hidden.clone(), positions, angles)
        if not self._is_last:
            dist.send(hidden, group=self._groups.pp, group_dst=self._groups.pp.rank() + 1)
            return None
        return self.logits(hidden)

    def _fixed_step(self, steps: FixedSteps, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Append a token to each row in a step of fixed shape; returns logits as `advance` does."""
        if self._model.position_embedding_type == "rope":
            self._angles_up_to(self._cache.num_positions)
        angles, num_resizes = self._tensors_of_steps
        if angles is not self._angles or num_resizes != self._cache.num_resizes:
            steps.forget()
            self._tensors_of_steps = self._angles, self._cache.num_resizes
        return steps.take(tokens, positions, self._cache.num_positions)

    def _take_step(self, tokens: Tensor, positions: Tensor, reach: int) -> Tensor:
        """Append tokens [b, 1] at positions [b, 1] to the first rows; returns logits [b, v]."""
        placement = Placement(0, (), positions, reach)
        self._cache.begin(placement)
        return self.logits(self._hidden_states(tokens, placement)[0])

    def _hidden_states(self, tokens: Tensor, placement: Placement) -> Tensor:
        """Run the layers of this stage; returns [s, b, h]."""
        model = self._model
        hidden = None
        if self._is_first:
            # What fills up a row may be placed beyond the last position that the model knows.
            positions = placement.positions.clamp(max=model.max_sequence_length - 1)
            hidden = model.embedding(input_ids=tokens, position_ids=positions)
        else:
            b, s = tokens.shape
            received = self._parameter.new_empty(s, b, model.config.hidden_size)
            dist.recv(received, group=self._groups.pp, group_src=self._groups.pp.rank() - 1)
            model.set_input_tensor(received)
        output: Tensor = model.decoder(
            hidden_states=hidden, attention_mask=None, rotary_pos_emb=self._rotation(placement)
        )
        return output.contiguous()

    def _rotation(self, placement: Placement) -> Tensor | None:
        """Return the rotary angles of the tokens' own positions, [s, b, 1, d]; None: positions are embedded."""
        if self._model.position_embedding_type != "rope":
            return None
        return self._angles_up_to(placement.num_positions)[placement.positions.t()][:, :, None, :]

    def _angles_up_to(self, num_positions: int) -> Tensor:
        """Return the rotary angles of at least the first positions, [p, d]."""
        if self._angles.shape[0] < num_positions:
            length = max(num_positions, 2 * self._angles.shape[0])
            self._angles = self._model.rotary_pos_emb.get_emb(length)[:, 0, 0].to(self._parameter.device)
        return self._angles


def _passes(lengths: Sequence[int], starts: Sequence[int], num_positions: int) -> Iterator[tuple[int, int]]:
    """Divide prompts among forward passes.

    A pass is as long as its longest prompt: little of it should be filling, and none of it beyond the last position.

    Args:
        lengths: What is to be read of each, in rising order.
        starts: Where each begins.
        num_positions: That the cache has.

    Yields:
        The first prompt of a pass, and that of the next one.
    """
    begin, latest = 0, starts[0]
    for number, (length, start) in enumerate(zip(lengths, starts, strict=True)):
        latest = max(latest, start)
        if number > begin and (length > 2 * lengths[begin] + _SHORT or latest + length > num_positions):
            yield begin, number
            begin, latest = number, start
    yield begin, len(lengths)


def takes_fixed_steps(model: LanguageModel) -> bool:
    """Return whether tokens are appended in steps of fixed shapes: on one GPU, and without experts.

    Several ranks exchange tensors in each step; experts tell the host how many tokens each has.
    """
    is_on_gpu = next(model.parameters()).device.type == "cuda"
    return is_on_gpu and int(model.pg_collection.mp.size()) == 1 and not model.config.num_moe_experts


def _check(model: LanguageModel) -> None:
    config = model.config
    problems = []
    if config.sequence_parallel:
        problems.append("with sequence parallelism: one token cannot be shared among ranks")
    if config.virtual_pipeline_model_parallel_size is not None:
        problems.append("in several chunks per pipeline rank")
    if config.context_parallel_size > 1:
        problems.append("with context parallelism")
    if config.apply_rope_fusion:
        problems.append("with fused rotary embeddings, which put all texts at one position")
    if problems:
        raise ConfigError(
            f"the model was built {'; '.join(problems)}",
            hint="build it with transformer_impl 'local', and parallel sizes for tensor and pipeline only",
        )
