"""Distillation at every layout against one rank of plain torch: losses, and by SGD the gradient of every parameter."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_7b.config.schema import RunConfig
from megatron_7b.conversion import import_from_hugging_face
from tests.conversion.tiny_models import save_tiny_model
from tests.support.checkpoint_runs import saved_tensors, train_save
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import VOCAB_SIZE, tiny_config
from tests.training.distillation_oracle import steps

TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "TP2": (2, TP2),
    "TP2 SP": (2, {**TP2, "sequence_parallel": True}),
    "PP2": (2, PP2),
    "PP2 VP2": (2, {**PP2, "virtual_pipeline_model_parallel_size": 2}),
    "CP2": (2, {"context_parallel_size": 2}),
    "DP2 sharded": (2, {"use_distributed_optimizer": True}),
}
NUM_STEPS = 2
TOLERANCE = 1e-5
"""Of gradients, which are what SGD adds to weights."""


SMALL, LARGE = {"num_hidden_layers": 4}, {"num_hidden_layers": 8, "hidden_size": 96}


def write_models(folder: Path, **models: tuple[str, dict[str, int]]) -> Path:
    """Write models of other widths and depths, as Hugging Face folders and as checkpoints."""
    for name, (case, size) in models.items():
        save_tiny_model(case, folder / f"{name}_hf", vocab_size=VOCAB_SIZE, **size)
        import_from_hugging_face(folder / f"{name}_hf", folder / name)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoders")
    many = {**LARGE, "num_attention_heads": 8, "num_key_value_heads": 4}
    return write_models(
        folder, student=("llama_tied", SMALL), teacher=("llama", LARGE), many_heads=("llama_tied", many)
    )


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one of the teachers the heads are as many as those of the student."""
    many = {**LARGE, "num_attention_heads": 12}
    folder = tmp_path_factory.mktemp("encoders")
    return write_models(
        folder, student=("bert", SMALL), teacher=("bert_untied", LARGE), many_heads=("bert_untied", many)
    )


def config_of(models: Path, parallel: dict[str, Any], teacher: str = "teacher", **how: Any) -> RunConfig:
    from megatron_7b.checkpoint.manifest import read_config

    config = tiny_config(
        parallel=parallel,
        optimizer={"name": "sgd", "sgd_momentum": 0.0, "weight_decay": 0.0, "clip_grad": 0.0, "lr": 1e-2},
        distillation={"teacher": str(models / teacher), **how},
        checkpoint={"initialize_from": str(models / "student")},
    )
    model = dataclasses.replace(
        read_config(models / "student").model,
        transformer_impl="local",
        make_vocab_size_divisible_by=8,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    return dataclasses.replace(config, model=model)


def build_from_weights(config: RunConfig) -> Any:
    from megatron_7b.checkpoint.load import load_weights
    from megatron_7b.training.learner import build_learner

    learner = build_learner(config, "cpu")
    start, may_lack = Path(str(config.checkpoint.initialize_from)), learner.on_ranks.adapter_names
    load_weights(start, learner.model, learner.optimizer, may_lack=may_lack)
    return learner


def weights_after(config: RunConfig, world_size: int, folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    results = run_ranks(world_size, _train, config, folder)
    return results[0], saved_tensors(folder / f"step_{NUM_STEPS:08d}")


def _train(config: RunConfig, folder: Path) -> list[float]:
    return [loss for loss, _ in train_save(config, folder, NUM_STEPS, build=build_from_weights)[0]]


def expected_weights(config: RunConfig, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from megatron_7b.conversion.weights import from_hugging_face

    ours = {name: tensor for name, tensor in tensors.items() if name.startswith("distillation.")}
    others = {name: tensor for name, tensor in tensors.items() if name not in ours}
    return dict(from_hugging_face(others, config.model, VOCAB_SIZE)) | ours


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_equal_plain_torch(layout: str, models: Path, tmp_path: Path) -> None:
    world_size, parallel = LAYOUTS[layout]
    config = config_of(models, parallel, temperature=2.0, alpha=0.7, loss="jsd", jsd_beta=0.3)
    _compare(config, world_size, models, tmp_path)


OWN_LAYOUTS: dict[str, tuple[int, dict[str, Any], int]] = {
    "DP2, teacher at TP2": (2, {}, 2),
    "PP2 DP2, teacher at TP2": (4, PP2, 2),
    "TP2 SP DP2, teacher at TP4": (4, {**TP2, "sequence_parallel": True}, 4),
}


@pytest.mark.parametrize("layout", OWN_LAYOUTS)
def test_a_shared_teacher_equals_plain_torch(layout: str, models: Path, tmp_path: Path) -> None:
    world_size, parallel, size = OWN_LAYOUTS[layout]
    how = {"temperature": 2.0, "alpha": 0.7, "teacher_tensor_model_parallel_size": size}
    teacher = "many_heads" if size == 4 else "teacher"
    _compare(config_of(models, parallel, teacher, **how), world_size, models, tmp_path)


@pytest.mark.parametrize("how", [{"loss": "forward_kl", "alpha": 1.0}, {"loss": "reverse_kl", "temperature": 0.5}])
def test_distances_equal_plain_torch(how: dict[str, Any], models: Path, tmp_path: Path) -> None:
    _compare(config_of(models, TP2, **how), 2, models, tmp_path)


MATCHED: dict[str, dict[str, Any]] = {
    "TP2 SP": {"attention": "kl", "attention_weight": 0.3},
    "PP2": {"attention": "kl", "layer_map": (2, 4, 0, 5)},
    "TP2": {"attention": "scores", "attention_weight": 0.5, "teacher": "many_heads"},
}


@pytest.mark.parametrize("layout", MATCHED)
def test_tokens_and_layers_of_encoders_equal_plain_torch(layout: str, encoders: Path, tmp_path: Path) -> None:
    world_size, parallel = LAYOUTS[layout]
    how = {"temperature": 2.0, "alpha": 0.7, "loss": "jsd", "jsd_beta": 0.3, "hidden": True, "hidden_weight": 0.4}
    _compare(config_of(encoders, parallel, **how, **MATCHED[layout]), world_size, encoders, tmp_path)


@pytest.mark.parametrize("layout", ["PP2 VP2", "CP2"])
def test_layers_of_decoders_equal_plain_torch(layout: str, models: Path, tmp_path: Path) -> None:
    world_size, parallel = LAYOUTS[layout]
    _compare(config_of(models, parallel, hidden=True), world_size, models, tmp_path)


def _compare(config: RunConfig, world_size: int, models: Path, folder: Path) -> None:
    losses, weights = weights_after(config, world_size, folder)
    expected, state = steps(config, models / "student_hf", Path(f"{config.distillation.teacher}_hf"), NUM_STEPS)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=0)
    wanted = expected_weights(config, state)
    differences = {name: (weights[name][: len(one)] - one).abs().max().item() for name, one in wanted.items()}
    name = max(differences, key=differences.__getitem__)
    print(f"loss {losses} against {expected}, weights {differences[name]:.1e} ({name})")
    assert differences[name] < TOLERANCE * config.optimizer.lr * NUM_STEPS
