"""Mixtures of experts: against transformers, at every layout, resumed, continued with a cache."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_7b.checkpoint import read_config, resolve_checkpoint
from megatron_7b.cli.main import main
from megatron_7b.config.schema import RunConfig
from megatron_7b.conversion import HuggingFaceFolder, to_hugging_face
from tests.conversion.tiny_models import save_tiny_model
from tests.distributed.test_layout_equivalence import TOLERANCE
from tests.generation.test_engine import GREEDY, PROMPTS, continue_texts, greedy_without_cache
from tests.support.checkpoint_runs import digest_after, resume_train, train_save
from tests.support.ranks import RankFailedError, run_ranks
from tests.support.tiny_runs import ArrayBatch, run_steps, tiny_config

MODEL = {
    "architecture": "mixtral",
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 80,
    "moe_aux_loss_coeff": 0.01,
}
EP2, TP2 = {"expert_model_parallel_size": 2}, {"tensor_model_parallel_size": 2, "sequence_parallel": True}
SHARDED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "EP2": (2, EP2),
    "TP2+SP": (2, TP2),
    "TP2+SPxEP2": (4, {**TP2, **EP2}),
    "PP2xEP2": (4, {"pipeline_model_parallel_size": 2, **EP2}),
    "CP2xEP2": (2, {"context_parallel_size": 2, **EP2}),
    "EP2xDP4+distributed optimizer": (4, {**EP2, "use_distributed_optimizer": True}),
    "full recompute": (1, {"recompute_granularity": "full"}),
}
EVERYTHING = (8, {"pipeline_model_parallel_size": 2, **TP2, **EP2, **SHARDED})
NUM_STEPS, SAVED_AT = 6, 3


def moe_config(**sections: Any) -> RunConfig:
    """At the usual 1e-2, norms jump in the fourth step, and rounding with them."""
    return tiny_config(optimizer={"lr": 3e-3}, **sections)


def train(config: RunConfig) -> tuple[list[tuple[float, float]], list[float]]:
    """Entry point of a rank: (loss, gradient norm) of each step, and how evenly experts were used in another one."""
    from megatron_7b.training.step import train_step
    from tests.support.tiny_runs import batches, build

    trainer = build(config)
    steps = run_steps(trainer, range(NUM_STEPS))
    layout = trainer.layout
    result = train_step(trainer, batches(config, 9, dp_rank=layout.dp_rank, dp_size=layout.dp_size), 0.0)
    return steps, list(result.losses.extra.values())


@pytest.fixture(scope="module")
def one_rank() -> tuple[list[tuple[float, float]], list[float]]:
    (found,) = run_ranks(1, train, moe_config(model=MODEL))
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_gives_the_same_losses(name: str, one_rank: Any) -> None:
    (expected, balance), (world_size, parallel) = one_rank, LAYOUTS[name]
    assert expected[-1][0] < 0.9 * expected[0][0]
    assert 1.0 < balance[0] < 2.0
    for steps, seen in run_ranks(world_size, train, moe_config(model=MODEL, parallel=parallel)):
        assert [loss for loss, _ in steps] == pytest.approx([loss for loss, _ in expected], rel=TOLERANCE)
        assert [norm for _, norm in steps] == pytest.approx([norm for _, norm in expected], rel=1e-4)
        assert seen == pytest.approx(balance, rel=1e-4)


def test_tensor_ranks_without_sequence_parallelism_are_refused() -> None:
    config = moe_config(model=MODEL, parallel={"tensor_model_parallel_size": 2})
    with pytest.raises(RankFailedError, match="add --parallel.sequence-parallel True"):
        run_ranks(2, train, config)


def test_resumed_runs_continue(tmp_path: Path) -> None:
    """Bit for bit at the layout that has written, and at others as an uninterrupted run would."""
    ((expected, _),) = run_ranks(1, digest_after, moe_config(model=MODEL), NUM_STEPS)
    written = moe_config(model=MODEL, parallel=EVERYTHING[1])
    uninterrupted = run_ranks(EVERYTHING[0], train_save, written, tmp_path, SAVED_AT, NUM_STEPS)
    resumed = run_ranks(EVERYTHING[0], resume_train, written, tmp_path, NUM_STEPS)
    assert [digest for _, digest in resumed] == [digest for _, digest in uninterrupted]
    for world_size, parallel in ((1, {}), LAYOUTS["EP2"]):
        for steps, _ in run_ranks(
            world_size, resume_train, moe_config(model=MODEL, parallel=parallel), tmp_path, NUM_STEPS
        ):
            assert [loss for loss, _ in steps] == pytest.approx(
                [loss for loss, _ in expected[SAVED_AT:]], rel=TOLERANCE
            )


@pytest.mark.parametrize(
    "parallel", [{}, {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}], ids=["TP1", "TP2", "PP2"]
)
def test_texts_continued_with_a_cache_are_those_without(parallel: dict[str, int]) -> None:
    model = {**MODEL, "init_method_std": 0.2}
    (expected,) = run_ranks(1, greedy_without_cache, tiny_config(model=model), PROMPTS, 12)
    for texts in run_ranks(
        2 if parallel else 1, continue_texts, tiny_config(model=model, parallel=parallel), PROMPTS, GREEDY
    ):
        assert texts == expected


def gradients(config: RunConfig, checkpoint: Path, tokens: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
    """Entry point of a rank: the loss of a microbatch that all replicas have, and this rank's gradients."""
    from megatron_7b.checkpoint.load import load_weights
    from megatron_7b.model.builder import named_canonical_parameters
    from megatron_7b.objective.microbatches import run_microbatches
    from megatron_7b.training.learner import build_learner

    learner = build_learner(config, "cpu")
    load_weights(checkpoint, learner.model)
    learner.model[0].train()
    positions = np.broadcast_to(np.arange(tokens.shape[1] - 1), (len(tokens), tokens.shape[1] - 1)).copy()
    labels = tokens[:, 1:].copy()
    batch = ArrayBatch(tokens[:, :-1].copy(), labels, np.ones(labels.shape, dtype=np.float32), positions)
    ((loss, count),) = run_microbatches(
        learner.model, [batch], learner.objective, layout=learner.layout, device=learner.device, forward_only=False
    ).tolist()
    named = named_canonical_parameters([learner.model[0].module])
    return loss / count, {name: parameter.main_grad.numpy().copy() for name, parameter in named}


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe"])
def test_loss_and_gradients_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    theirs = save_tiny_model(case, tmp_path / "hf")
    assert main(["convert", "from-hf", "--input", str(tmp_path / "hf"), "--output", str(tmp_path / "c")]) == 0
    folder = resolve_checkpoint(tmp_path / "c")
    model = dataclasses.replace(read_config(folder).model, transformer_impl="local")
    tokens = np.random.default_rng(2).integers(0, 199, (2, 33))
    output = theirs(input_ids=torch.from_numpy(tokens), labels=torch.from_numpy(tokens))
    output.loss.backward()
    for parameter in theirs.parameters():  # to have them split, and named, as weights are on disk
        parameter.data, parameter.grad = parameter.grad, None
    theirs.save_pretrained(tmp_path / "gradients")
    expected = HuggingFaceFolder(tmp_path / "gradients")
    for world_size, parallel in ((1, {}), (2, EP2)):
        config = dataclasses.replace(tiny_config(data={"seq_length": 32}, parallel=parallel), model=model)
        losses, of_ranks = zip(*run_ranks(world_size, gradients, config, folder, tokens), strict=True)
        assert losses == pytest.approx([output.loss.item()] * world_size, rel=1e-5)
        ours = {name: torch.from_numpy(value) for held in of_ranks for name, value in held.items()}
        for name, value in to_hugging_face(ours, model, 199):
            torch.testing.assert_close(value, expected[name], atol=2e-5, rtol=1e-4)


def rows_of_experts(counts: list[int]) -> tuple[list[int], list[np.ndarray], list[np.ndarray]]:
    """Entry point of a rank: rows that experts are given in BF16, and outputs and gradients of ours and upstream's."""
    from megatron.core.transformer.moe.experts import SequentialMLP

    from megatron_7b.model.experts import Experts
    from tests.support.tiny_runs import build

    model = build(moe_config(model=MODEL, precision={"params_dtype": "bf16"})).model[0]
    experts = next(module for module in model.modules() if isinstance(module, Experts))
    rows: list[int] = []
    for expert in experts.local_experts:
        expert.register_forward_pre_hook(lambda _module, inputs: rows.append(len(inputs[0])))
    found = []
    for forward in (Experts.forward, SequentialMLP.forward):
        generator = torch.Generator().manual_seed(3)
        hidden = torch.randn(sum(counts), 64, generator=generator).bfloat16().requires_grad_()
        probs = torch.rand(sum(counts), generator=generator).requires_grad_()
        model.zero_grad_buffer()
        output, _ = forward(experts, hidden, torch.tensor(counts), probs)
        output.float().square().sum().backward()
        weights = [parameter.main_grad.clone() for parameter in experts.parameters()]
        found.append([one.detach().float().numpy() for one in (output, hidden.grad, probs.grad, *weights)])
    return rows, *found


def test_bf16_experts_see_few_shapes_and_compute_the_same() -> None:
    """oneDNN compiles, and keeps, something for each."""
    ((rows, ours, theirs),) = run_ranks(1, rows_of_experts, [70, 0, 1, 128])
    assert rows == [128, 0, 64, 128, 70, 0, 1, 128]
    for own, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(own, other, rtol=2e-2, atol=2e-2)
