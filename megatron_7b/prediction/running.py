"""A head's outputs for sequences of any lengths, at any layout; sequences share rows."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron_7b.data import Batch
from megatron_7b.data.samples.dataset import RecordsOfBatch
from megatron_7b.model.on_ranks import ModelOnRanks
from megatron_7b.objective import build_objective
from megatron_7b.objective.microbatches import run_outputs
from megatron_7b.prediction.tasks import ModelInput, Outputs


@torch.inference_mode()
def compute_outputs(model: ModelOnRanks, sequences: Sequence[ModelInput]) -> list[Outputs]:
    """Return the head's outputs for each sequence, [n, labels] each, on every rank.

    What a sequence gets does not depend on the others. n is 1 for a text, the number of its words that have a token,
    or all tokens of a question with its text.

    Args:
        model: A loaded model with a head.
        sequences: The same on all ranks; none longer than `data.seq_length`.

    Collective: all ranks.
    """
    layout = model.layout
    row = model.config.training.micro_batch_size * model.config.data.seq_length
    rows = list(_filled(sequences, row))
    count = layout.pp_size * layout.dp_size  # interleaved schedules want multiples
    rows += [[] for _ in range(-len(rows) % count)]
    own = rows[layout.dp_rank :: layout.dp_size]
    batches = [_batch([sequences[number] for number in numbers], row, model.config.model.num_labels) for numbers in own]
    objective = build_objective(model.config)
    outputs = run_outputs(model.chunks, batches, objective, layout=layout, device=model.device)
    found: dict[int, Outputs] = {}
    for numbers, batch, logits in zip(own, batches, outputs, strict=False):  # no outputs before the last stage
        assert batch.records is not None
        counts = _outputs_per_sequence(batch, model.config.model.head)
        parts = np.split(logits.float().cpu().numpy(), np.cumsum(counts)[:-1]) if numbers else []
        found.update(zip(numbers, parts, strict=True))
    of_ranks: list[dict[int, Outputs]] = [{}] * dist.get_world_size()
    dist.all_gather_object(of_ranks, found if layout.tp_rank == 0 else {})
    merged = {number: part for of_rank in of_ranks for number, part in of_rank.items()}
    return [merged[number] for number in range(len(sequences))]


def _filled(sequences: Sequence[ModelInput], row: int) -> Iterator[list[int]]:
    """Yield the numbers of the sequences that share a row, in their order."""
    numbers: list[int] = []
    used = 0
    for number, sequence in enumerate(sequences):
        if numbers and used + len(sequence.ids) > row:
            yield numbers
            numbers, used = [], 0
        numbers.append(number)
        used += len(sequence.ids)
    if numbers:
        yield numbers


def _batch(sequences: Sequence[ModelInput], row: int, num_labels: int) -> Batch:
    """Return sequences as one row, filled up at its end."""
    lengths = np.array([len(one.ids) for one in sequences], np.int64)
    begins = np.cumsum(lengths) - lengths
    tokens, positions = np.zeros((1, row), np.int64), np.zeros((1, row), np.int64)
    token_values = np.zeros((1, row), np.float32)
    for one, begin in zip(sequences, begins.tolist(), strict=True):
        place = slice(begin, begin + len(one.ids))
        tokens[0, place], token_values[0, place] = one.ids, one.token_values
        positions[0, place] = np.arange(len(one.ids))
    used = int(lengths.sum())
    # What fills up is cut as if it were sequences, so that its positions stay within those that the model has.
    longest = int(lengths.max()) if len(lengths) else min(row, 8)
    filling = list(range(used, row, longest))
    for begin in filling:
        positions[0, begin : begin + longest] = np.arange(min(longest, row - begin))
    return Batch(
        tokens,
        labels=np.zeros((1, row), np.int64),
        loss_mask=np.zeros((1, row), np.float32),
        position_ids=positions,
        cu_seqlens=np.array([*begins, *filling, row], np.int32),
        records=RecordsOfBatch(
            begins=begins,
            lengths=lengths,
            record=np.arange(len(sequences)),
            numbers=np.arange(len(sequences)),
            values=np.zeros((len(sequences), max(num_labels, 2)), np.float32),
            token_values=token_values,
        ),
    )


def _outputs_per_sequence(batch: Batch, head: str) -> list[int]:
    records = batch.records
    assert records is not None
    if head == "sequence_classification":
        return [1] * len(records.begins)
    if head == "question_answering":
        return [int(length) for length in records.lengths]
    values = records.token_values[0]
    return [
        int((values[begin : begin + length] != 0).sum())
        for begin, length in zip(records.begins.tolist(), records.lengths.tolist(), strict=True)
    ]
