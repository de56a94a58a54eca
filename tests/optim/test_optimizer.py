"""Every optimizer against torch's own, its parameter groups, steps that are skipped, and parameters that are frozen."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_7b.config import load_config
from megatron_7b.config.schema import ModelConfig, RunConfig
from megatron_7b.model.kinds import parameter_table
from megatron_7b.optim.muon import divided, joined, orthogonalized, scale
from tests.support.checkpoint_runs import resume_train, saved_tensors, train_save
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import VOCAB_SIZE, build, run_steps, tiny_config

NUM_STEPS = 4
BF16 = torch.bfloat16
FROZEN = ("embedding.", "decoder.layers.0.", "decoder.layers.1.")
OWN: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adam": {"adam_beta1": 0.8, "adam_eps": 1e-6},
    "sgd": {"lr": 0.1, "sgd_momentum": 0.8, "sgd_nesterov": True},
    "muon": {"muon_matmul_dtype": "bf16", "muon_adamw_lr": 0.003, "muon_nesterov": False},
}


def config_of(name: str, **sections: dict[str, Any]) -> RunConfig:
    """With decay and clipping that show, on a model that has fused matrices, norms and biases."""
    settings = {"name": name, "weight_decay": 0.3, "clip_grad": 0.5, **OWN[name]}
    return tiny_config(model={"add_qkv_bias": True, "architecture": "qwen2"}, optimizer=settings, **sections)


class Reference:
    """torch's optimizers over copies of a model's parameters, which take its gradients before each update."""

    def __init__(self, trainer: Any) -> None:
        from megatron_7b.model.builder import described_parameters

        self._model: ModelConfig = trainer.config.model
        self._settings = settings = trainer.config.optimizer
        self._rows = list(described_parameters(trainer.model[0].module))
        self.copies = {
            row.name: [part.detach().clone().requires_grad_() for part in self._divided(row, parameter)]
            for row, parameter in self._rows
        }
        decayed: dict[str, list[Tensor]] = {"matrix": [], "other": [], "vector": []}
        for row, _ in self._rows:
            kind = "vector" if len(row.shape) == 1 else "matrix" if row.is_layer_matrix else "other"
            decayed[kind] += self.copies[row.name]
        groups = [
            {"params": decayed["matrix"] + decayed["other"], "weight_decay": settings.weight_decay},
            {"params": decayed["vector"], "weight_decay": 0.0},
        ]
        adam = {"betas": (settings.adam_beta1, settings.adam_beta2), "eps": settings.adam_eps, "lr": settings.lr}
        match settings.name:
            case "adamw":
                self._optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, **adam)]
            case "adam":
                self._optimizers = [torch.optim.Adam(groups, **adam)]
            case "sgd":
                sgd = {"momentum": settings.sgd_momentum, "nesterov": settings.sgd_nesterov}
                self._optimizers = [torch.optim.SGD(groups, lr=settings.lr, **sgd)]
            case "muon":
                groups[0]["params"] = decayed["other"]
                muon = {"momentum": settings.muon_momentum, "nesterov": False, "adjust_lr_fn": "match_rms_adamw"}
                self._optimizers = [
                    torch.optim.AdamW(groups, **{**adam, "lr": settings.muon_adamw_lr}),
                    torch.optim.Muon(decayed["matrix"], lr=settings.lr, weight_decay=settings.weight_decay, **muon),
                ]

    def _divided(self, row: Any, values: Tensor) -> list[Tensor]:
        return divided(row, values, self._model) if row.is_layer_matrix else [values]

    def step(self) -> None:
        for row, parameter in self._rows:
            for copy, gradient in zip(self.copies[row.name], self._divided(row, parameter.main_grad), strict=True):
                copy.grad = gradient.clone()
        everything = [copy for copies in self.copies.values() for copy in copies]
        torch.nn.utils.clip_grad_norm_(everything, self._settings.clip_grad)
        for optimizer in self._optimizers:
            optimizer.step()

    def largest_difference(self) -> float:
        pairs = ((self.copies[row.name], self._divided(row, parameter)) for row, parameter in self._rows)
        return max(float((a - b).abs().max()) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))


def against_torch(config: RunConfig) -> tuple[float, float]:
    """Entry point of a rank: the largest difference of a parameter from torch's, and the largest change of one."""
    trainer = build(config)
    reference = Reference(trainer)
    before = [parameter.detach().clone() for parameter in trainer.model[0].parameters()]
    ours = trainer.optimizer.step

    def step(learning_rate: float) -> Any:
        reference.step()
        return ours(learning_rate)

    trainer.optimizer.step = step
    run_steps(trainer, range(NUM_STEPS))
    moved = zip(trainer.model[0].parameters(), before, strict=True)
    return reference.largest_difference(), max(float((a - b).abs().max()) for a, b in moved)


@pytest.mark.parametrize("is_distributed", [False, True])
@pytest.mark.parametrize("name", OWN)
def test_it_is_torchs(name: str, is_distributed: bool) -> None:
    config = config_of(name, parallel={"use_distributed_optimizer": is_distributed})
    ((difference, change),) = run_ranks(1, against_torch, config)
    assert change > 0.01
    # The last digit of a clipped gradient may decide how it is rounded to BF16, and the orthogonalization amplifies it.
    assert difference < (1e-3 if name == "muon" else 2e-6)


@pytest.mark.parametrize("shape", [(64, 96), (96, 64)])
def test_an_orthogonalized_matrix_is_torchs(shape: tuple[int, int]) -> None:
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    parameter = torch.zeros(shape, requires_grad=True)
    parameter.grad = gradient.clone()
    torch.optim.Muon([parameter], lr=1.0, momentum=0.0, nesterov=False, weight_decay=0.0).step()
    factor = scale(*shape, mode="shape_scaling")
    in_bf16, exact = (
        factor * orthogonalized(gradient.to(dtype), num_steps=5).float() for dtype in (BF16, torch.float32)
    )
    torch.testing.assert_close(-parameter.detach(), in_bf16, rtol=1e-6, atol=0.0)
    assert float((exact - in_bf16).norm() / exact.norm()) < 0.02


def test_the_rates_of_groups_follow_the_schedule() -> None:
    (found,) = run_ranks(1, _groups_after_half_the_rate, config_of("muon"))
    assert found == {
        ("matrix", 0.005, 0.3),
        ("embedding", 0.0015, 0.3),
        ("vector", 0.0015, 0.0),
    }


def _groups_after_half_the_rate(config: RunConfig) -> set[tuple[str, float, float]]:
    from megatron_7b.model.builder import described_parameters

    trainer = build(config)
    trainer.optimizer.step(config.optimizer.lr / 2)
    kinds = {}
    for row, parameter in described_parameters(trainer.model[0].module):
        kinds[parameter] = "vector" if len(row.shape) == 1 else "matrix" if row.is_layer_matrix else "embedding"
    groups = trainer.optimizer.core.param_groups
    return {(kinds[one], group["lr"], group["weight_decay"]) for group in groups for one in group["params"]}


@pytest.mark.parametrize("name", OWN)
def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing(name: str) -> None:
    assert run_ranks(1, _skipped, config_of(name)) == [(True, 2, True)]


def _skipped(config: RunConfig) -> tuple[bool, int, bool]:
    """Entry point of a rank: whether the third step was skipped, the updates that count, whether all is as before."""
    from megatron_7b.optim.state import state_rows

    trainer = build(config)
    run_steps(trainer, range(2))

    def everything() -> list[Tensor]:
        return [*trainer.model[0].parameters(), *(row.tensor for row in state_rows(trainer.optimizer))]

    before = [one.detach().clone() for one in everything()]
    next(trainer.model[0].parameters()).main_grad.view(-1)[3] = float("nan")
    outcome = trainer.optimizer.step(0.01)
    is_same = all(torch.equal(a, b) for a, b in zip(everything(), before, strict=True))
    return outcome.skipped, trainer.optimizer.num_updates, is_same


def build_frozen(config: RunConfig) -> Any:
    """Build a trainer of which the embedding and the first half of the layers are frozen."""
    from megatron_7b.model.builder import described_parameters
    from megatron_7b.training import learner

    def frozen_first(chunks: list[Any], *arguments: Any) -> Any:
        for chunk in chunks:
            for row, parameter in described_parameters(chunk):
                parameter.requires_grad = not row.name.startswith(FROZEN)
        return wrap(chunks, *arguments)

    wrap = learner.wrap_data_parallel
    learner.wrap_data_parallel = frozen_first
    try:
        return build(config)
    finally:
        learner.wrap_data_parallel = wrap


def _frozen(config: RunConfig) -> tuple[int, int, int, bool]:
    """Entry point of a rank: elements trained, of gradient buffers, and of state; whether the rest is as before."""
    from megatron_7b.optim.state import state_rows

    trainer = build_frozen(config)
    parameters = list(trainer.model[0].parameters())
    before = [one.detach().clone() for one in parameters if not one.requires_grad]
    run_steps(trainer, range(2))
    after = [one for one in parameters if not one.requires_grad]
    buffers = sum(buffer.grad_data.numel() for buffer in trainer.model[0].buffers)
    return (
        sum(one.numel() for one in parameters if one.requires_grad),
        buffers,
        sum(row.tensor.numel() for row in state_rows(trainer.optimizer)),
        all(torch.equal(a, b) for a, b in zip(before, after, strict=True)),
    )


@pytest.mark.parametrize(("name", "tensors"), [("adamw", 2), ("sgd", 1)])
def test_frozen_parameters_cost_no_gradient_and_no_state(name: str, tensors: int) -> None:
    ((trained, buffered, state, is_same),) = run_ranks(1, _frozen, config_of(name))
    assert 0 < trained <= buffered < trained + 4096
    assert state == tensors * trained
    assert is_same


@pytest.mark.parametrize(
    ("name", "world_size", "parallel"),
    [
        ("adamw", 2, {"use_distributed_optimizer": True}),
        ("muon", 2, {"tensor_model_parallel_size": 2}),
        ("muon", 2, {"pipeline_model_parallel_size": 2}),
    ],
    ids=["DP2, distributed optimizer", "TP2", "PP2, whose first stage is frozen"],
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_half_frozen_model_resumes(
    name: str, world_size: int, parallel: dict[str, Any], dtype: str, tmp_path: Path
) -> None:
    config = config_of(name, parallel=parallel, precision={"params_dtype": dtype})
    whole = run_ranks(world_size, functools.partial(train_save, build=build_frozen), config, tmp_path, 2, 4)
    resumed = run_ranks(world_size, functools.partial(resume_train, build=build_frozen), config, tmp_path, 4)
    assert [digest for _, digest in resumed] == [digest for _, digest in whole]
    names = saved_tensors(tmp_path / "step_00000002").keys()
    table = parameter_table(config.model, VOCAB_SIZE)
    assert table.keys() <= names
    state = {name.split(".", maxsplit=3)[3] for name in names if name.startswith("optimizer.state.")}
    assert state == {name for name in table if not name.startswith(FROZEN)}


def test_newton_schulz_brings_singular_values_near_one() -> None:
    for rows, columns in ((40, 64), (64, 40), (48, 48)):
        values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
        singular = torch.linalg.svdvals(orthogonalized(values, num_steps=5))
        assert float(singular.max()) < 1.25
        assert float(singular.median()) > 0.65
    assert not orthogonalized(torch.zeros(4, 6), num_steps=5).any()


def test_fused_matrices_are_divided_and_joined() -> None:
    model = tiny_config().model
    table = parameter_table(model, VOCAB_SIZE)
    shapes = {
        "self_attention.linear_qkv": [(64, 64), (32, 64), (32, 64)],
        "mlp.linear_fc1": [(96, 64), (96, 64)],
        "mlp.linear_fc2": [(64, 96)],
    }
    for name, expected in shapes.items():
        row = table[f"decoder.layers.0.{name}.weight"]
        values = torch.randn(row.shape)
        matrices = divided(row, values, model)
        assert [tuple(matrix.shape) for matrix in matrices] == expected
        assert torch.equal(joined(row, matrices, model), values)
    # The heads of the second group are behind those of the first: 2 query heads, a key and a value head of 16 rows.
    row = table["decoder.layers.0.self_attention.linear_qkv.weight"]
    query, key, value = divided(row, torch.arange(128.0)[:, None].expand(128, 64), model)
    assert query[:, 0].tolist() == [*range(32), *range(64, 96)]
    assert key[:, 0].tolist() == [*range(32, 48), *range(96, 112)]
    assert value[:, 0].tolist() == [*range(48, 64), *range(112, 128)]


def test_keys_and_values_of_cross_attention_are_divided() -> None:
    model = load_config("t5_tiny_cpu").model
    row = parameter_table(model, VOCAB_SIZE)["decoder.layers.0.cross_attention.linear_kv.weight"]
    values = torch.arange(float(row.shape[0]))[:, None].expand(row.shape)
    width = model.head_width
    key, value = divided(row, values, model)
    assert key[: 2 * width, 0].tolist() == [*range(width), *range(2 * width, 3 * width)]
    assert value[:width, 0].tolist() == [*range(width, 2 * width)]
    assert torch.equal(joined(row, [key, value], model), values)


def test_layers_of_every_kind_have_matrices() -> None:
    for preset, per_layer in {"tiny_cpu": 4, "bert_tiny_cpu": 4, "t5_tiny_cpu": 4 + 7, "gpt2_tiny_cpu": 4}.items():
        model = load_config(preset).model
        rows = [row for row in parameter_table(model, VOCAB_SIZE).values() if row.is_layer_matrix]
        assert len(rows) == per_layer * model.num_layers, preset
        assert not any("embedding" in row.name or "output_layer" in row.name or "head" in row.name for row in rows)


def test_scales_are_those_of_megatron_core() -> None:
    assert scale(16, 4, mode="spectral") == scale(4, 16, mode="spectral") == 4
    assert (scale(16, 4, mode="shape_scaling"), scale(4, 16, mode="shape_scaling")) == (2, 1)
    assert (scale(16, 4, mode="unit_rms_norm"), scale(4, 16, mode="unit_rms_norm")) == (2, 0.5)
