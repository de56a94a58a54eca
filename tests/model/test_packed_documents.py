"""Documents packed into one row: each is computed as if it were alone, and none sees another."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from megatron_7b.errors import ConfigError
from tests.distributed.test_layout_equivalence import LAYOUTS, TOLERANCE
from tests.support.ranks import run_ranks
from tests.support.reference_gpt import reference_logits
from tests.support.tiny_runs import SEQ_LENGTH, VOCAB_SIZE, ArrayBatch, build, cumulative_lengths, tiny_config, train

PACKED = {"reset_attention_mask": True}
BEGINS = ((0, 5, 6, 20), (0, 31))
"""Places in the two rows at which a document begins; two of the documents are a single token long."""


def packed_batch(*, changed: int | None = None) -> ArrayBatch:
    """Two rows of random tokens; the tokens of the document with number `changed` are others."""
    generator = np.random.default_rng(5)
    tokens, labels, others = generator.integers(0, VOCAB_SIZE, (3, 2, SEQ_LENGTH))
    begins = np.zeros_like(tokens, dtype=bool)
    for row, places in enumerate(BEGINS):
        begins[row, list(places)] = True
    if changed is not None:
        within = np.cumsum(begins.ravel()).reshape(begins.shape) - 1 == changed
        tokens = np.where(within, others, tokens)
    mask, positions = np.ones(tokens.shape, dtype=np.float32), np.zeros_like(tokens)
    return ArrayBatch(tokens, labels, mask, positions, cumulative_lengths(begins))


def logits_of(trainer, batch: ArrayBatch) -> torch.Tensor:
    """The true vocabulary's logits [b × s, v] on one rank."""
    from megatron_7b.objective.inputs import model_inputs

    inputs = model_inputs(batch, trainer.device, trainer.layout)
    del inputs["labels"], inputs["loss_mask"]
    with torch.no_grad():
        return trainer.model[0].eval()(**inputs)[..., :VOCAB_SIZE].flatten(0, 1).float()


def weights_of(trainer) -> dict[str, torch.Tensor]:
    from megatron_7b.model.builder import named_canonical_parameters

    return {name: value.detach() for name, value in named_canonical_parameters([trainer.model[0].module])}


def compare_with_documents_alone() -> list[float]:
    trainer = build(tiny_config(data=PACKED, model={"rotary_base": 100.0}))
    batch = packed_batch()
    together = logits_of(trainer, batch)
    tokens, bounds = torch.from_numpy(batch.tokens).flatten(), batch.cu_seqlens.tolist()
    differences = []
    for begin, end in pairwise(bounds):
        alone = reference_logits(weights_of(trainer), trainer.config.model, tokens[None, begin:end])[0, :, :VOCAB_SIZE]
        differences.append((together[begin:end] - alone).abs().max().item())
    return differences


def test_a_document_is_computed_as_if_it_were_alone() -> None:
    (differences,) = run_ranks(1, compare_with_documents_alone)
    assert len(differences) == 6
    assert max(differences) < 1e-5


def find_leaks(packed: bool) -> list[tuple[int, list[int]]]:
    """Of each document that is changed: which documents' logits or input gradients notice."""
    trainer = build(tiny_config(data={"reset_attention_mask": packed}))

    def observe(batch: ArrayBatch) -> torch.Tensor:
        if packed:
            return logits_of(trainer, batch)
        batch.cu_seqlens = None
        return logits_of(trainer, batch)

    bounds = packed_batch().cu_seqlens.tolist()
    before = observe(packed_batch())
    noticed = []
    for changed in range(len(bounds) - 1):
        differs = (observe(packed_batch(changed=changed)) != before).any(dim=1)
        noticed.append((changed, [n for n in range(len(bounds) - 1) if differs[bounds[n] : bounds[n + 1]].any()]))
    return noticed


def test_no_document_notices_that_another_changed() -> None:
    (leaks,) = run_ranks(1, find_leaks, True)
    assert leaks == [(document, [document]) for document in range(6)]


def test_documents_notice_where_attention_crosses_them() -> None:
    (leaks,) = run_ranks(1, find_leaks, False)
    assert dict(leaks)[0] == [0, 1, 2, 3]  # the later ones of its row


def gradient_of_each_token() -> list[list[int]]:
    """The documents that the loss of one document sends gradients to."""
    trainer = build(tiny_config(data=PACKED))
    from megatron_7b.objective.inputs import model_inputs

    batch = packed_batch()
    bounds, reached = batch.cu_seqlens.tolist(), []
    embedding = trainer.model[0].module.embedding
    for document in range(len(bounds) - 1):
        batch.loss_mask.ravel()[:] = 0.0
        batch.loss_mask.ravel()[bounds[document] : bounds[document + 1]] = 1.0
        kept = []
        handle = embedding.register_forward_hook(lambda _m, _i, output, kept=kept: kept.append(output))
        loss = trainer.model[0].train()(**model_inputs(batch, trainer.device, trainer.layout))
        handle.remove()
        (gradient,) = torch.autograd.grad(loss, kept)
        touched = gradient.flatten(0, 1).abs().sum(dim=1) > 0
        reached.append([n for n in range(len(bounds) - 1) if touched[bounds[n] : bounds[n + 1]].any()])
    return reached


def test_gradients_stay_within_their_document() -> None:
    (reached,) = run_ranks(1, gradient_of_each_token)
    assert reached == [[document] for document in range(6)]


@pytest.fixture(scope="module")
def one_rank() -> list[tuple[float, float]]:
    (steps,) = run_ranks(1, train, tiny_config(data=PACKED), 4)
    return steps


@pytest.mark.parametrize(
    "name",
    [
        "TP2+SP",
        "PP2xVPP2",
        "TP2xPP2",
        "full recompute, block, TP2+SP",
        "selective recompute",
        "CP2xTP2+SP",
        "CP4, full recompute",
    ],
)
def test_layouts_give_the_same_losses(name: str, one_rank: list[tuple[float, float]]) -> None:
    world_size, parallel = LAYOUTS[name]
    for steps in run_ranks(world_size, train, tiny_config(data=PACKED, parallel=parallel), 4):
        assert [loss for loss, _ in steps] == pytest.approx([loss for loss, _ in one_rank], rel=TOLERANCE)
        assert [norm for _, norm in steps] == pytest.approx([norm for _, norm in one_rank], rel=1e-4)


def test_packing_changes_the_loss(one_rank: list[tuple[float, float]]) -> None:
    (crossing,) = run_ranks(1, train, tiny_config(data={"reset_attention_mask": False}), 4)
    assert abs(crossing[0][0] - one_rank[0][0]) > 1e-4


def attend_in_another_format() -> str:
    from megatron.core.packed_seq_params import PackedSeqParams

    trainer = build(tiny_config())
    attention = trainer.model[0].module.decoder.layers[0].self_attention.core_attention
    rows = torch.zeros(SEQ_LENGTH, 1, 4, 16)
    with pytest.raises(ConfigError) as refusal:
        attention(rows, rows, rows, None, packed_seq_params=PackedSeqParams(qkv_format="sbhd"))
    return str(refusal.value)


def test_a_format_that_cannot_be_honoured_is_refused() -> None:
    (message,) = run_ranks(1, attend_in_another_format)
    assert "packed format other than thd" in message
