"""Hidden states and attention of a student beside its teacher's, each on the pipeline stage that has the layers.

Forward hooks see both models' layers. When a chunk of the student has run, what it has shown is compared with what the
teacher's chunk has shown of the same microbatch, and the comparison becomes a part of the graph behind the chunk's
output: its gradients start when the backward pass of the chunk does. So no stage has to send states to another, and the
pipeline's schedule knows nothing of it.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor
from torch.nn import functional

from megatron_7b.config.distillation_config import DistillationConfig
from megatron_7b.model.kinds import kind_of
from megatron_7b.model.kinds.chunk import ModelChunk
from megatron_7b.model.layer_pairs import EMBEDDING, LayerPair
from megatron_7b.model.on_ranks import ModelOnRanks
from megatron_7b.model.projections import projection_of

HIDDEN_LOSS, ATTENTION_LOSS = "hidden_loss", "attention_loss"
"""Under which the terms are reported, each a mean over tokens before its weight."""


@dataclass
class Seen:
    """What a chunk has shown in one forward pass, by place.

    Attributes:
        states: Hidden states, [s, b, h] or [s/tp, b, h].
        heads: Queries and keys of the layer before the place, [t, n/tp, d] each.
    """

    states: dict[int, Tensor] = field(default_factory=dict)
    heads: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Compared:
    """Which tokens of a microbatch are compared, and where its texts are.

    Attributes:
        weights: FP32 weight of each token as this rank holds them, [s, b] or [s/tp, b].
        tokens: The same of all tokens of the texts, [s × b].
        texts: First token and end of each text that has any weight.
    """

    weights: Tensor
    tokens: Tensor
    texts: Sequence[tuple[int, int]]


def observe(
    chunk: ModelChunk,
    places: frozenset[int],
    *,
    core_layers_per_layer: int,
    with_attention: bool,
    use: Callable[[Seen, Tensor], Tensor | None],
) -> None:
    """Have every forward pass of a chunk hand what it shows at some places to a function, from now on.

    Args:
        chunk: The chunk.
        places: The places of the whole model; those of other chunks do not matter.
        core_layers_per_layer: That of its kind.
        with_attention: Whether queries and keys are wanted too.
        use: Takes what was seen, and the chunk's last hidden states; what it returns takes their place.
    """
    seen = Seen()

    def keep_states(place: int) -> Callable[..., None]:
        def keep(_module: object, _inputs: object, output: Any) -> None:
            seen.states[place] = output[0] if isinstance(output, tuple) else output

        return keep

    def keep_heads(place: int) -> Callable[..., None]:
        def keep(_module: object, inputs: tuple[Tensor, ...]) -> None:
            seen.heads[place] = inputs[0], inputs[1]

        return keep

    def end(_module: object, _inputs: object, output: Tensor) -> Tensor | None:
        nonlocal seen
        ended, seen = seen, Seen()
        return use(ended, output)

    if EMBEDDING in places and hasattr(chunk, "embedding"):
        chunk.embedding.register_forward_hook(keep_states(EMBEDDING))
    for layer in chunk.stack.layers:
        place, rest = divmod(layer.layer_number, core_layers_per_layer)
        if rest == 0 and place in places:
            layer.register_forward_hook(keep_states(place))
            if with_attention:
                layer.self_attention.core_attention.register_forward_pre_hook(keep_heads(place))
    chunk.stack.register_forward_hook(end)


class Matching:
    """Compares this rank's part of a student with that of its teacher, microbatch by microbatch.

    Args:
        student: This rank's part of it.
        teacher: The chunks of the teacher, as many as the student's.
        pairs: The places that are compared.
        how: What is compared, and how.
    """

    def __init__(
        self, student: ModelOnRanks, teacher: Sequence[ModelChunk], pairs: Sequence[LayerPair], how: DistillationConfig
    ) -> None:
        self._how, self._layout = how, student.layout
        self._pairs, self._num_layers = pairs, sum(pair.student != EMBEDDING for pair in pairs)
        self._told: list[deque[Seen]] = [deque() for _ in teacher]
        self._compared: list[deque[Compared]] = [deque() for _ in teacher]
        self._scale, self._num_tokens = 0.0, 0.0
        self._sums = torch.zeros(2, dtype=torch.float64, device=student.device)
        places = frozenset(pair.student for pair in pairs), frozenset(pair.teacher for pair in pairs)
        kind, with_attention = kind_of(student.config.model), how.attention != "none"
        options: dict[str, Any] = {
            "core_layers_per_layer": kind.core_layers_per_layer,
            "with_attention": with_attention,
        }
        for number, (own, other) in enumerate(zip(student.chunks, teacher, strict=True)):
            observe(other, places[1], use=self._listener(number), **options)
            observe(own, places[0], use=self._judge(number, own), **options)

    def begin(self) -> None:
        """Forget what is left of an earlier step; the teacher goes through the microbatches of the next one now."""
        for told, compared in zip(self._told, self._compared, strict=True):
            told.clear()
            compared.clear()

    def expect(self, compared: Sequence[Compared], *, num_losses: float, num_tokens: float) -> None:
        """Prepare for the student's passes through the microbatches that the teacher has seen.

        Args:
            compared: Of each microbatch.
            num_losses: What the step divides sums by: the number of the task's losses in the global batch.
            num_tokens: The number of tokens that are compared in it, which these terms are means over.
        """
        self._scale, self._num_tokens = num_losses / max(1.0, num_tokens), num_tokens
        self._sums.zero_()
        for queue in self._compared:
            queue.extend(compared)

    def terms(self) -> dict[str, tuple[float, float, float]]:
        """Return the terms of the step's loss by name: weight, sum over the global batch, and number of tokens.

        Collective: all ranks.
        """
        dist.all_reduce(self._sums)  # those that hold the same have it once
        states, attention = self._sums.tolist()
        found = {}
        if self._how.hidden:
            found[HIDDEN_LOSS] = self._how.hidden_weight, states, self._num_tokens
        if self._how.attention != "none":
            found[ATTENTION_LOSS] = self._how.attention_weight, attention, self._num_tokens
        return found

    def _listener(self, chunk: int) -> Callable[[Seen, Tensor], None]:
        def listen(seen: Seen, _output: Tensor) -> None:
            # The schedule may free what it has sent on: a tensor of our own shares the values.
            states = {place: tensor.detach() for place, tensor in seen.states.items()}
            heads = {place: (query.detach(), key.detach()) for place, (query, key) in seen.heads.items()}
            self._told[chunk].append(Seen(states, heads))

        return listen

    def _judge(self, number: int, chunk: ModelChunk) -> Callable[[Seen, Tensor], Tensor | None]:
        def judge(seen: Seen, output: Tensor) -> Tensor | None:
            if not self._told[number]:  # it is asked for something else than a step, such as to generate
                return None
            told, compared = self._told[number].popleft(), self._compared[number].popleft()
            loss = self._loss(chunk, seen, told, compared)
            return _with_loss(output, loss) if torch.is_grad_enabled() and loss.requires_grad else None

        return judge

    def _loss(self, chunk: ModelChunk, seen: Seen, told: Seen, compared: Compared) -> Tensor:
        """Return this chunk's term of the loss of a microbatch, and add it to what is reported."""
        zero = compared.weights.new_zeros(())
        states, attention, is_main = zero, zero, self._layout.tp_rank == 0
        for pair in self._pairs:
            if self._how.hidden and pair.student in seen.states:
                own, other = seen.states[pair.student], told.states[pair.teacher]
                states = states + _states_apart(own, other, projection_of(chunk, pair.student), compared.weights)
            if pair.student in seen.heads:
                own_heads, others = seen.heads[pair.student], told.heads[pair.teacher]
                attention = attention + _attention_apart(own_heads, others, compared, chunk, self._how.attention)
        states, attention = states / len(self._pairs), attention / max(1, self._num_layers)
        is_divided = chunk.config.sequence_parallel, _has_as_many_heads(seen, told)
        for index, (term, divided) in enumerate(zip((states, attention), is_divided, strict=True)):
            if divided or is_main:
                self._sums[index] += term.detach()
        return self._scale * (self._how.hidden_weight * states + self._how.attention_weight * attention)


def _states_apart(own: Tensor, other: Tensor, projection: torch.nn.Module | None, weights: Tensor) -> Tensor:
    """Return the sum over tokens of the mean squared differences of their hidden states."""
    projected = own if projection is None else projection(own)
    return ((projected.float() - other.float()).square().mean(dim=-1) * weights).sum()


def _has_as_many_heads(seen: Seen, told: Seen) -> bool:
    return all(
        own[0].shape[1] == other[0].shape[1]
        for own, other in zip(seen.heads.values(), told.heads.values(), strict=False)
    )


def _attention_apart(
    own: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], compared: Compared, chunk: ModelChunk, how: str
) -> Tensor:
    """Return the sum over tokens of how far what they attend to is from what they attend to in the teacher.

    Head by head, of which each rank has its own, and the mean over them; or if the models have different numbers of
    heads, of the means over the heads, which all ranks have.

    Args:
        own: Queries and keys of the student, [t, n/tp, d] each.
        other: Those of the teacher.
        compared: Which tokens.
        chunk: The student's.
        how: `kl` or `scores`.

    Collective: the tensor-parallel group, if the numbers of heads differ.
    """
    group = chunk.pg_collection.tp
    is_by_head, total = own[0].shape[1] == other[0].shape[1], own[0].new_zeros((), dtype=torch.float32)
    for begin, end in compared.texts:
        scores = [_scores(query[begin:end], key[begin:end]) for query, key in (own, other)]
        if is_by_head:
            apart = _rows_apart(scores[0], scores[1], how).sum(dim=0) / (scores[0].shape[0] * group.size())
        elif how == "kl":
            apart = _kl_of_logs(
                *(_mean_of_heads(part.softmax(dim=-1), group).clamp_min(1e-30).log() for part in scores)
            )
        else:
            apart = (_mean_of_heads(scores[0], group) - _mean_of_heads(scores[1], group)).square().mean(dim=-1)
        total = total + (apart * compared.tokens[begin:end]).sum()
    return total


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """Return the scores of one text's queries and keys, [length, n/tp, d] each, before the softmax: [n/tp, l, l]."""
    scores: Tensor = torch.einsum("qnd,knd->nqk", query.float(), key.float())
    return scores / math.sqrt(query.shape[-1])


def _rows_apart(own: Tensor, other: Tensor, how: str) -> Tensor:
    """Compare scores, [n/tp, l, l], for each query: [n/tp, l]."""
    if how == "kl":
        return _kl_of_logs(own.log_softmax(dim=-1), other.log_softmax(dim=-1))
    return (own - other).square().mean(dim=-1)


def _kl_of_logs(own: Tensor, other: Tensor) -> Tensor:
    """Return KL(teacher || student) of logarithms of probabilities over the last dimension."""
    return functional.kl_div(own, other, reduction="none", log_target=True).sum(dim=-1)


def _mean_of_heads(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the mean over the heads of all ranks, [l, l]. Collective: the tensor-parallel group."""
    total: Tensor = reduce_from_tensor_model_parallel_region(values.sum(dim=0), group=group)
    return total / (values.shape[0] * group.size())


class _WithLoss(torch.autograd.Function):
    """Hidden states whose backward pass also starts that of a loss."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor) -> Tensor:  # noqa: ARG004 - torch's signature
        return hidden.clone()  # a view could not be freed once it has been sent to the next stage

    @staticmethod
    def backward(ctx: Any, grad_hidden: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG004
        return grad_hidden, grad_hidden.new_ones((), dtype=torch.float32)


def _with_loss(hidden: Tensor, loss: Tensor) -> Tensor:
    attached: Tensor = _WithLoss.apply(hidden, loss)
    return attached
