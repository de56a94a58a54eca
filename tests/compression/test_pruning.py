"""Pruned models: nothing is lost with what was silent, scores are transformers' at every layout, the whole road."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from megatron_7b.checkpoint import read_config, tokenizer_path
from megatron_7b.checkpoint.inference_config import inference_config
from megatron_7b.checkpoint.open_model import opened_model
from megatron_7b.checkpoint.weights import CheckpointWeights
from megatron_7b.compression.pruning import CalibrationText, PruneOptions, plan_pruning, prune_checkpoint
from megatron_7b.compression.pruning.measuring import measure_loss_of, measure_without
from megatron_7b.compression.pruning.samples import TextSamples
from megatron_7b.compression.pruning.scores import Scores
from megatron_7b.conversion import import_from_hugging_face
from megatron_7b.conversion.checkpoint_logits import checkpoint_logits
from megatron_7b.conversion.importing import ImportOptions
from megatron_7b.conversion.parity import random_tokens
from megatron_7b.errors import CheckpointError, ConfigError, PathError
from tests.compression.prunable_models import (
    LLAMA,
    MODELS,
    SILENT_CHANNELS,
    SILENT_LAYER,
    VOCAB_SIZE,
    measured,
    plant,
    random_weights,
    write_model,
    write_text,
)
from tests.conversion.tiny_models import save_tiny_model, save_tiny_tokenizer
from tests.support.commands import run_command
from tests.support.ranks import run_ranks
from tests.support.small_disk import small_disk

SAMPLES = random_tokens(VOCAB_SIZE, num_samples=5, length=17).tolist()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tiny_tokenizer(folder, vocab_size=VOCAB_SIZE)
    return folder


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> CalibrationText:
    file = write_text(tmp_path_factory.mktemp("text") / "text.jsonl")
    return CalibrationText(file=file, num_samples=4, num_held_out=2, seq_length=16)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"), LLAMA, random_weights(LLAMA), tokenizer)


@pytest.mark.parametrize("architecture", MODELS)
def test_what_is_silent_is_found_and_not_missed(
    architecture: str, tmp_path: Path, tokenizer: Path, calibration: CalibrationText
) -> None:
    model = MODELS[architecture]
    weights = random_weights(model)
    plant(model, weights)
    source = write_model(tmp_path / "c", model, weights, tokenizer)
    heads = {"num_query_groups": 3} if model.traits.has_query_groups else {"num_attention_heads": 3}
    options = PruneOptions(num_layers=3, hidden_size=24, ffn_hidden_size=24, **heads)
    pruned = prune_checkpoint(source, tmp_path / "d", calibration, options)
    kept = pruned.measured.kept
    assert kept.removed == (SILENT_LAYER,)
    assert sorted({*range(32)} - set(kept.channels.tolist())) == sorted(SILENT_CHANNELS)
    tokens = random_tokens(VOCAB_SIZE, length=40)
    before, after = (
        checkpoint_logits(folder, tokens, arithmetic=torch.float64)[..., :VOCAB_SIZE]
        for folder in (source, tmp_path / "d")
    )
    assert before.std() > 0.1
    # Factors of norms are rounded to FP32; where queries and keys are normalised too, epsilon stays.
    tolerance = 1e-4 if model.qk_layernorm else 1e-6
    assert (after - before).abs().max() <= tolerance * before.abs().max()
    assert pruned.measured.loss_after == pytest.approx(pruned.measured.loss_before, rel=max(1e-5, tolerance))
    assert read_config(tmp_path / "d").model == pruned.plan.target
    assert tokenizer_path(tmp_path / "d") is not None


def test_the_same_sizes_are_the_same_bits(llama: Path, tmp_path: Path, calibration: CalibrationText) -> None:
    options = PruneOptions(num_layers=4, hidden_size=32, ffn_hidden_size=48, num_attention_heads=8, num_query_groups=4)
    prune_checkpoint(llama, tmp_path / "same", calibration, options)
    assert read_config(tmp_path / "same").model == read_config(llama).model
    before, after = CheckpointWeights(llama), CheckpointWeights(tmp_path / "same")
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_scores_are_equal_at_every_layout(llama: Path) -> None:
    (expected,) = run_ranks(1, measured, llama, {}, SAMPLES)
    two_tensor, two_stages = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
    cases = [(2, two_tensor), (2, {**two_tensor, "sequence_parallel": True}), (2, two_stages), (2, {})]
    cases.append((4, {**two_tensor, **two_stages}))
    cases.append((2, {**two_stages, "pipeline_model_parallel_layout": (3, 1)}))
    for world_size, layout in cases:
        for scores in run_ranks(world_size, measured, llama, layout, SAMPLES):
            assert_same(scores, expected, 1e-5)


def assert_same(scores: Scores, expected: Scores, tolerance: float) -> None:
    for name in Scores.__dataclass_fields__:
        found, wanted = np.asarray(getattr(scores, name)), np.asarray(getattr(expected, name))
        # An angle is the arc cosine of what is rounded close to 1: half of the digits.
        slack = 1e-3 if name == "angular_distances" else tolerance
        np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=slack * np.abs(wanted).max(), err_msg=name)


@pytest.mark.parametrize("case", ["llama_tied", "qwen3", "gpt2"])
def test_scores_are_those_of_hooks_on_transformers(case: str, tmp_path: Path) -> None:
    theirs = save_tiny_model(case, tmp_path / "hf")
    import_from_hugging_face(tmp_path / "hf", tmp_path / "c", ImportOptions())
    samples = random_tokens(199, num_samples=5, length=17).tolist()
    (scores,) = run_ranks(1, measured, tmp_path / "c", {}, samples)
    assert_same(scores, hooked(theirs, torch.tensor(samples)), 1e-4)


def hooked(model: torch.nn.Module, ids: torch.Tensor) -> Scores:
    """Return the scores of transformers' model, from hooks on its modules."""
    config: Any = model.config
    is_gpt2 = config.model_type == "gpt2"
    layers: Any = model.transformer.h if is_gpt2 else model.model.layers
    last: Any = model.transformer.ln_f if is_gpt2 else model.model.norm
    seen: dict[str, list[torch.Tensor]] = {"state": [], "norm_in": [], "norm_out": [], "units": [], "heads": []}

    def inputs_to(key: str) -> Callable[..., None]:
        return lambda _, inputs: seen[key].append(inputs[0].double())

    for layer in layers:
        norms = (layer.ln_1, layer.ln_2) if is_gpt2 else (layer.input_layernorm, layer.post_attention_layernorm)
        norms[0].register_forward_pre_hook(inputs_to("state"))
        for norm in norms:
            norm.register_forward_pre_hook(inputs_to("norm_in"))
            norm.register_forward_hook(lambda _, __, output: seen["norm_out"].append(output.double()))
        (layer.mlp.c_proj if is_gpt2 else layer.mlp.down_proj).register_forward_pre_hook(inputs_to("units"))
        (layer.attn.c_proj if is_gpt2 else layer.self_attn.o_proj).register_forward_pre_hook(inputs_to("heads"))
    last.register_forward_pre_hook(inputs_to("state"))
    last.register_forward_pre_hook(inputs_to("norm_in"))
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits
    states = functional.normalize(torch.stack(seen["state"]).flatten(1, 2), dim=-1)
    cosines = torch.einsum("ith,jth->ijt", states, states).clamp(-1, 1)
    energies = torch.stack(seen["norm_in"])
    if is_gpt2:
        energies = energies - energies.mean(-1, keepdim=True)
    heads = torch.stack(seen["heads"]).unflatten(-1, (config.num_attention_heads, -1)).norm(dim=-1)

    def aggregated(activations: torch.Tensor) -> torch.Tensor:
        return activations.abs().mean(-2).square().sum(-2)

    return Scores(
        loss=functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item(),
        cosine_distances=(1 - cosines).mean(-1).numpy(),
        angular_distances=(cosines.arccos() / torch.pi).mean(-1).numpy(),
        units=aggregated(torch.stack(seen["units"])).sqrt().numpy(),
        heads=aggregated(heads).sqrt().numpy(),
        channels=aggregated(torch.stack(seen["norm_out"])).sum(0).sqrt().numpy(),
        energies=energies.square().mean((1, 2)).numpy(),
    )


def test_loss_without_layers_is_that_of_the_pruned_model(
    llama: Path, tmp_path: Path, calibration: CalibrationText
) -> None:
    """By perplexity the layers are removed without which the loss is lowest, and that loss is the pruned model's."""
    text = TextSamples(SAMPLES)
    settings = {"data.seq_length": text.seq_length}
    with opened_model(llama, inference_config(llama, settings)) as model:
        losses = measure_without(model, text, [(0,), (1, 2)])
        assert measure_without(model, text, [()])[()] == measure_loss_of(model, text)
    for layers, loss in losses.items():
        folder = tmp_path / f"without {layers}"
        prune_checkpoint(llama, folder, calibration, PruneOptions(drop_layers=layers))
        with opened_model(folder, inference_config(folder, settings)) as model:
            assert measure_loss_of(model, text) == pytest.approx(loss, rel=1e-6)
    options = PruneOptions(num_layers=2, depth_score="perplexity", contiguous=True)
    kept = prune_checkpoint(llama, tmp_path / "best", calibration, options).measured.kept
    best = min(kept.candidates, key=lambda one: one.score)
    assert (len(kept.candidates), kept.removed) == (3, best.layers)


def test_layers_keep_their_own_windows(tmp_path: Path, tokenizer: Path, calibration: CalibrationText) -> None:
    trained = replace(MODELS["qwen3"], window_size=5, window_attn_skip_freq=(1, 0, 1, 0))
    source = write_model(tmp_path / "c", trained, random_weights(trained), tokenizer)
    text = TextSamples(SAMPLES)
    settings = {"data.seq_length": text.seq_length}
    remaining = {(0,): (None, 5, None), (3,): (5, None, 5), (1, 3): (5, 5), (0, 2): (None, None)}
    with opened_model(source, inference_config(source, settings)) as model:
        losses = measure_without(model, text, list(remaining))
    for layers, windows in remaining.items():
        folder = tmp_path / f"without {layers}"
        prune_checkpoint(source, folder, calibration, PruneOptions(drop_layers=layers))
        assert read_config(folder).model.layer_windows == windows
        with opened_model(folder, inference_config(folder, settings)) as model:
            assert measure_loss_of(model, text) == pytest.approx(losses[layers], rel=1e-6)
    with pytest.raises(ConfigError, match="name the layers yourself, with --drop-layers"):
        plan_pruning(trained, PruneOptions(num_layers=2))


def test_the_command_prunes_at_two_ranks_and_what_follows_works(
    llama: Path, tmp_path: Path, calibration: CalibrationText
) -> None:
    words = ("--calibration", calibration.file, "--num-samples", 4, "--num-held-out", 2, "--seq-length", 16)
    words = (*words, "--num-layers", 2, "--depth-score", "angular", "--hidden-size", 24, "--num-attention-heads", 4)
    layout = ("--nproc", 2, "--parallel.tensor-model-parallel-size", 2, "--runtime.num-threads", 1)
    small, folder = tmp_path / "small", tmp_path / "hf"
    words = (*words, "--report", tmp_path / "report.html")
    done = run_command("compress", "prune", "--checkpoint", llama, "--output", small, *words, *layout, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    first, second = found["layers"]["removed"]
    assert second == first + 1
    assert found["parameters"]["after"] < found["parameters"]["before"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(f"<h2>{name}</h2>" in page for name in ("Layers", "Heads", "Channels"))
    record = json.loads((small / "pruning.json").read_text())
    assert record["made_from"] == str(llama.resolve())
    assert record["layers"] == found["layers"]
    for step in (
        ("convert", "to-hf", "--checkpoint", small, "--output", folder),  # publishes only equal logits
        ("generate", "--checkpoint", small, "--prompt", "we hold", "--max-new-tokens", 3),
        ("evaluate", "--checkpoint", small, "--text", calibration.file),
    ):
        done = run_command(*step)
        assert done.returncode == 0, done.stderr
    again = run_command("compress", "prune", "--checkpoint", llama, "--output", small, *words)
    assert again.returncode == 2
    assert "is not empty" in again.stderr


def test_the_command_knows_the_context_and_what_cannot_be_exported(
    llama: Path, tmp_path: Path, calibration: CalibrationText
) -> None:
    """Samples are as long as the context by default; Llama's width is a multiple of its heads."""
    words = (
        "compress",
        "prune",
        "--checkpoint",
        llama,
        "--output",
        tmp_path / "small",
        "--calibration",
        calibration.file,
    )
    done = run_command(*words, "--seq-length", LLAMA.max_position_embeddings + 1, "--num-layers", 2)
    assert done.returncode == 2
    assert f"the model's context is {LLAMA.max_position_embeddings}" in done.stderr
    few = ("--num-samples", 2, "--num-held-out", 1, "--runtime.num-threads", 1)
    done = run_command(*words, *few, "--hidden-size", LLAMA.num_attention_heads + 2)
    assert done.returncode == 0, done.stderr
    assert "no model that `convert to-hf` writes" in done.stderr
    assert f"perplexity of {LLAMA.max_position_embeddings:,} held-out tokens" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing is to be pruned"),
        ({"num_layers": 5, "hidden_size": 64}, r"--num-layers is 5, expected 1 to 4(.|\n)*--hidden-size is 64"),
        ({"num_attention_heads": 3}, "expected a multiple of 2, or give --num-query-groups"),
        ({"num_attention_heads": 8, "num_query_groups": 3}, "expected a multiple of --num-query-groups, which is 3"),
        ({"num_attention_heads": 8, "num_query_groups": 2}, "leaves 4 query heads to each, but there are 2"),
        ({"drop_layers": (1, 9)}, "--drop-layers has 9, expected numbers from 0 to 3"),
        ({"drop_layers": (1,), "num_layers": 2}, "but --drop-layers leaves 3"),
        ({"drop_layers": (0, 1, 2, 3)}, "names all layers"),
    ],
)
def test_sizes_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_pruning(LLAMA, PruneOptions(**options))


def test_models_that_cannot_be_pruned_are_refused(
    llama: Path, tmp_path: Path, tokenizer: Path, calibration: CalibrationText
) -> None:
    options = PruneOptions(num_layers=2)
    for change, message in (
        ({"num_moe_experts": 4, "architecture": "mixtral"}, "mixtures of experts cannot be pruned"),
        ({"head": "sequence_classification"}, "prune the language model that it was made from"),
        ({"architecture": "bert"}, "only decoders can be pruned"),
    ):
        with pytest.raises(ConfigError, match=message):
            plan_pruning(replace(LLAMA, **change), options)  # type: ignore[arg-type]
    gpt2 = MODELS["gpt2"]
    with pytest.raises(ConfigError, match="one head for each 8"):
        plan_pruning(gpt2, PruneOptions(hidden_size=24))
    with pytest.raises(PathError, match="would replace what is read"):
        prune_checkpoint(llama, llama, calibration, options)
    with pytest.raises(ConfigError, match="samples of 17 need .* 2 of these are held out"):
        prune_checkpoint(llama, tmp_path / "d", replace(calibration, num_samples=10**5), options)
    assert not (tmp_path / "d").exists()
    bare = write_model(tmp_path / "bare", LLAMA, random_weights(LLAMA), tokenizer)
    for file in (bare / "tokenizer").iterdir():
        file.unlink()
    with pytest.raises(CheckpointError):
        prune_checkpoint(bare, tmp_path / "d", calibration, options)


def test_a_full_disk_costs_neither_figures_nor_the_report(
    llama: Path, tmp_path: Path, calibration: CalibrationText
) -> None:
    with small_disk(tmp_path / "full", 4) as full:
        (full / "other").write_bytes(bytes(4096))
        done = run_command(
            "compress", "prune", "--checkpoint", llama, "--output", tmp_path / "small", "--num-layers", 2, "--json",
            "--calibration", calibration.file, "--num-samples", 4, "--num-held-out", 2, "--seq-length", 16,
            "--report", full / "report.html",
        )  # fmt: skip
    assert done.returncode == 1
    assert json.loads(done.stdout.splitlines()[-1])["perplexity"]
    rescued = re.search(r"report.html cannot be written: No space left on device; it is in (\S+) instead", done.stderr)
    assert rescued is not None, done.stderr
    assert "<h2>Layers</h2>" in Path(rescued[1]).read_text(encoding="utf-8")
    shutil.rmtree(Path(rescued[1]).parent)
