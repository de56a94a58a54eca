"""Zeros in matrices: where they are, what they cost, the same inputs at every layout, and the command."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_7b.checkpoint.weights import CheckpointWeights
from megatron_7b.compression.pruning.sparsity import Pattern, SparseMethod, sparsify
from megatron_7b.compression.quantization.statistics import output_error
from megatron_7b.conversion import import_from_hugging_face
from megatron_7b.conversion.importing import ImportOptions
from megatron_7b.conversion.parity import random_tokens
from megatron_7b.errors import ConfigError
from tests.compression.prunable_models import (
    LLAMA,
    VOCAB_SIZE,
    measured_inputs,
    random_weights,
    write_model,
    write_text,
)
from tests.conversion.tiny_models import save_tiny_model, save_tiny_tokenizer
from tests.support.commands import run_command
from tests.support.ranks import run_ranks

METHODS: tuple[SparseMethod, ...] = ("magnitude", "wanda", "sparsegpt")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny_tokenizer(folder / "tokenizer", vocab_size=VOCAB_SIZE)
    return write_model(folder / "c", LLAMA, random_weights(LLAMA), folder / "tokenizer")


@pytest.mark.parametrize("pattern", ["0.5", "2:4", "0.25"])
def test_zeros_are_where_they_may_be_and_cost_less_the_more_is_known(pattern: str) -> None:
    generator = torch.Generator().manual_seed(1)
    # Inputs of unequal size that resemble one another: what a method knows of them helps it.
    mixing = torch.eye(128) + 0.1 * torch.randn(128, 128, generator=generator)
    sizes = torch.linspace(0.1, 2, 128)[torch.randperm(128, generator=generator)]
    inputs = torch.randn(1000, 128, generator=generator) @ mixing * sizes
    weight, gram = torch.randn(24, 128, generator=generator), inputs.T @ inputs
    parsed, errors = Pattern.parse(pattern), []
    for method in METHODS:
        sparse = sparsify(weight, gram, parsed, method)
        errors.append(output_error(weight, sparse, gram))
        zeros = sparse == 0
        if pattern == "2:4":
            assert (zeros.reshape(-1, 4).sum(1) == 2).all()
        else:
            assert zeros.double().mean() == pytest.approx(parsed.share)
        if method != "sparsegpt":
            assert torch.equal(sparse[~zeros], weight[~zeros])
    assert errors[0] > errors[1] > errors[2]
    scores = weight.abs() * inputs.norm(dim=0)
    wanda = sparsify(weight, gram, parsed, "wanda")
    groups = scores.reshape(-1, 4) if pattern == "2:4" else scores
    count = 2 if pattern == "2:4" else round(parsed.share * 128)
    border = groups.sort(1).values[:, count - 1 : count]
    assert torch.equal(wanda.reshape(groups.shape) == 0, groups <= border)


def test_weights_that_remain_make_up_for_one_that_goes() -> None:
    """Of the first column nothing is left; the others are then the solution of least squares."""
    inputs = torch.randn(300, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inputs[:, 0] += inputs[:, 1:].sum(1)
    weight = torch.tensor([[0.01, 1.0, -2.0, 3.0]])
    gram = (inputs.T @ inputs).float()
    sparse = sparsify(weight, gram, Pattern(0.25), "sparsegpt")
    assert sparse[0, 0] == 0
    damped = gram.double() + 0.01 * gram.diagonal().double().mean() * torch.eye(4, dtype=torch.float64)
    solved = weight[0, 1:].double() + weight[0, 0].double() * torch.linalg.solve(damped[1:, 1:], damped[1:, 0])
    torch.testing.assert_close(sparse[0, 1:].double(), solved, rtol=1e-6, atol=1e-6)


def test_inputs_are_equal_at_every_layout_and_those_of_transformers(llama: Path, tmp_path: Path) -> None:
    samples = random_tokens(VOCAB_SIZE, num_samples=5, length=17).tolist()
    (expected,) = run_ranks(1, measured_inputs, llama, {}, samples)
    assert len(expected) == 8
    two_tensor, two_stages = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
    for layout in (two_tensor, {**two_tensor, "sequence_parallel": True}, two_stages, {}):
        for found in run_ranks(2, measured_inputs, llama, layout, samples):
            assert found.keys() == expected.keys()
            for name, gram in found.items():
                np.testing.assert_allclose(gram, expected[name], rtol=1e-4, atol=1e-5 * np.abs(gram).max())
    theirs = save_tiny_model("llama", tmp_path / "hf", vocab_size=VOCAB_SIZE)
    import_from_hugging_face(tmp_path / "hf", tmp_path / "c", ImportOptions())
    (found,) = run_ranks(1, measured_inputs, tmp_path / "c", {}, samples)
    seen: list[torch.Tensor] = []
    layer = theirs.model.layers[1]  # type: ignore[union-attr, index]
    for module in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.up_proj, layer.mlp.down_proj):  # type: ignore[union-attr]
        module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1)))  # type: ignore[union-attr, operator]
    with torch.no_grad():
        theirs(torch.tensor(samples)[:, :-1])
    for gram, inputs in zip(list(found.values())[:4], seen, strict=True):
        np.testing.assert_allclose(gram, (inputs.T @ inputs).numpy(), rtol=1e-3, atol=1e-4 * np.abs(gram).max())


def test_the_command_writes_zeros_and_a_report(llama: Path, tmp_path: Path) -> None:
    text, sparse = write_text(tmp_path / "text.jsonl"), tmp_path / "sparse"
    words = ("compress", "prune", "--checkpoint", llama, "--output", sparse, "--calibration", text, "--num-samples", 4)
    words = (*words, "--num-held-out", 2, "--seq-length", 16, "--sparsity", "2:4", "--runtime.num-threads", 1)
    done = run_command(
        *words, "--method", "sparsegpt", "--json", "--nproc", 2, "--parallel.tensor-model-parallel-size", 2
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {one["sparsity"] for one in found["matrices"]} == {0.5}
    assert len(found["matrices"]) == 16
    before, after = CheckpointWeights(llama), CheckpointWeights(sparse)
    changed = {one["name"] for one in found["matrices"]}
    assert all(torch.equal(before[name], after[name]) == (name not in changed) for name in before)
    done = run_command(*words, "--num-layers", 2)
    assert done.returncode == 2
    assert "--sparsity does not go together with --num-layers" in done.stderr


@pytest.mark.parametrize("text", ["0", "1", "half", "4:2", "1.5", "nan"])
def test_sparsities_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a share between 0 and 1"):
        Pattern.parse(text)
