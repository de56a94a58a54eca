"""Padded pairs of sentences against transformers' model for pre-training: losses, classes and gradients; padding."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from megatron_7b.checkpoint import resolve_checkpoint
from megatron_7b.config.schema import RunConfig
from megatron_7b.data import Batch
from megatron_7b.model.kinds import parameter_table
from tests.model.test_against_transformers import LAYOUTS, VOCAB_SIZE, model_config, shard
from tests.support.ranks import run_ranks

LENGTHS, WIDTH = (13, 16, 5, 16), 16


def config_of(architecture: str, **parallel: Any) -> RunConfig:
    return model_config(architecture, is_tied=True, pairs="next_sentence", **parallel)


def pairs_batch(*, padding: int = 0, words_before: bool = False) -> Batch:
    """Four rows with their padding; the second has nothing that is predicted, as one behind the end of a corpus."""
    random, shape = np.random.default_rng(3), (len(LENGTHS), WIDTH)
    ids, labels = (random.integers(0, VOCAB_SIZE, shape) for _ in range(2))
    mask = (random.random(shape) < 0.4).astype(np.float32)
    types = (np.arange(WIDTH) >= np.array(LENGTHS)[:, None] // 2).astype(np.int64)
    before = random.random(shape) < 0.3
    is_padding = np.arange(WIDTH) >= np.array(LENGTHS)[:, None]
    ids[is_padding], types[is_padding], mask[is_padding] = padding, 0, 0
    mask[1] = 0
    bounds = {row * WIDTH + at for row, length in enumerate(LENGTHS) for at in (0, length)} | {len(LENGTHS) * WIDTH}
    return Batch(
        ids,
        labels,
        mask,
        np.tile(np.arange(WIDTH), (len(LENGTHS), 1)),
        cu_seqlens=np.array(sorted(bounds), dtype=np.int32),
        tokentype_ids=types,
        is_word_before=before if words_before else None,
        pair_labels=np.array([1, 0, 0, 1]),
    )


def reference(architecture: str) -> Any:
    from transformers import AutoConfig, AutoModelForPreTraining

    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = AutoConfig.for_model(architecture, **sizes, intermediate_size=96, max_position_embeddings=16)
    model = AutoModelForPreTraining.from_config(config, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm_weight = name.lower().endswith(("norm.weight", "ln.weight"))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + is_norm_weight)
    return model


def write_reference(architecture: str, folder: Path) -> None:
    """Entry point of a rank: the reference's weights as a checkpoint of ours."""
    from megatron_7b.checkpoint.weights import write_weights
    from megatron_7b.conversion import from_hugging_face

    config = config_of(architecture)
    weights = {n: t for n, t in reference(architecture).state_dict().items() if not n.endswith("position_ids")}
    write_weights(folder, from_hugging_face(weights, config.model, VOCAB_SIZE), config)


def run_ours(config: RunConfig, folder: Path, batches: list[Batch]) -> tuple[list[float], dict[str, np.ndarray]]:
    """Entry point of a rank: all sums and numbers of each batch, and gradients of the first one's sum."""
    from megatron_7b.checkpoint.load import load_weights
    from megatron_7b.model.builder import named_canonical_parameters
    from megatron_7b.objective.microbatches import run_microbatches
    from megatron_7b.parallel.groups import broadcast_from_last_stage
    from megatron_7b.training.learner import build_learner

    core = build_learner(config, "cpu")
    core.model[0].train()
    load_weights(folder, core.model)
    results, gradients = [], {}
    for number, batch in enumerate(batches):
        totals = run_microbatches(
            core.model, [batch], core.objective, layout=core.layout, device=core.device, forward_only=number > 0
        )
        results.append(broadcast_from_last_stage(totals).tolist())
        if number == 0:
            count = results[0][0][1]
            named = named_canonical_parameters([core.model[0].module])
            gradients = {name: parameter.main_grad.numpy() * count for name, parameter in named}
    return results, gradients


def expected(architecture: str, batch: Batch) -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    """The same from transformers: each row's pair counts as often as it has predicted tokens."""
    from megatron_7b.conversion import from_hugging_face

    model = reference(architecture)
    ids, labels, mask, types = (
        torch.from_numpy(x) for x in (batch.tokens, batch.labels, batch.loss_mask, batch.tokentype_ids)
    )
    attended = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]
    output = model(input_ids=ids, attention_mask=attended.long(), token_type_ids=types)
    masked = (cross_entropy(output.prediction_logits.transpose(1, 2), labels, reduction="none") * mask).sum()
    truth, rows = torch.from_numpy(batch.pair_labels), mask.sum(dim=1)
    losses = cross_entropy(output.seq_relationship_logits, truth, reduction="none")
    loss = masked + (rows * losses).sum()
    loss.backward()
    read = rows > 0
    right = ((output.seq_relationship_logits.argmax(1) == truth) & read).sum()
    sums = [(loss, rows.sum()), (masked, rows.sum()), (losses[read].sum(), read.sum()), (right, read.sum())]
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    named = dict(from_hugging_face(gradients, config_of(architecture).model, VOCAB_SIZE))
    return [[part.item() for part in one] for one in sums], named


@pytest.mark.parametrize("architecture", ["bert", "megatron-bert"])
def test_pairs_are_classified_as_by_transformers(architecture: str, tmp_path: Path) -> None:
    run_ranks(1, write_reference, architecture, tmp_path)
    batches = [pairs_batch(), pairs_batch(padding=VOCAB_SIZE - 1)]
    sums, gradients = expected(architecture, batches[0])
    table = parameter_table(config_of(architecture).model, VOCAB_SIZE)
    for layout in LAYOUTS.values():
        tp = layout.get("tensor_model_parallel_size", 1)
        world = tp * layout.get("pipeline_model_parallel_size", 1)
        results = run_ranks(world, run_ours, config_of(architecture, **layout), resolve_checkpoint(tmp_path), batches)
        seen = set()
        for rank, (ours, own) in enumerate(results):
            assert [value for one in ours[0] for value in one] == pytest.approx(sum(sums, []), rel=3e-6)  # noqa: RUF017
            assert ours[1] == ours[0], "padding has an influence"
            for name, gradient in own.items():
                seen.add(name)
                right = shard(table[name], gradients[name], gradient.shape, rank % tp, tp)
                np.testing.assert_allclose(gradient, right, rtol=1e-4, atol=3e-5, err_msg=name)
        assert seen == set(gradients) == set(table)


def test_words_before_are_reported_apart(tmp_path: Path) -> None:
    run_ranks(1, write_reference, "bert", tmp_path)
    config, folder = config_of("bert"), resolve_checkpoint(tmp_path)
    both = replace(config, objective=replace(config.objective, predict_word_before=True))
    (((plain,), _),) = run_ranks(1, run_ours, config, folder, [pairs_batch()])
    ((((loss, masked, before, *of_pairs),), _),) = run_ranks(
        1, run_ours, both, folder, [pairs_batch(words_before=True)]
    )
    assert loss == pytest.approx(plain[0])
    assert np.add(masked, before) == pytest.approx(plain[1])
    assert before[1] > 0
    assert of_pairs == plain[2:]
