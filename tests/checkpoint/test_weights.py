"""Whole tensors out of a sharded checkpoint, and into one, without a model."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_7b.checkpoint import resolve_checkpoint
from megatron_7b.checkpoint.inference_config import inference_config
from megatron_7b.checkpoint.weights import CheckpointWeights, write_weights
from megatron_7b.config.schema import RunConfig
from megatron_7b.errors import CheckpointError
from megatron_7b.model.kinds import parameter_table
from tests.support.checkpoint_runs import train_save
from tests.support.ranks import RankFailedError, run_ranks
from tests.support.tiny_runs import VOCAB_SIZE, build, run_steps, tiny_config


def train_from(config: RunConfig, folder: Path, num_steps: int) -> list[tuple[float, float]]:
    """Entry point of a rank: start from the weights of a checkpoint."""
    from megatron_7b.checkpoint.load import load_weights

    trainer = build(config)
    load_weights(resolve_checkpoint(folder), trainer.model, trainer.optimizer)
    return run_steps(trainer, range(num_steps))


def main_parameter_sums(config: RunConfig, folder: Path) -> list[float]:
    """Entry point of a rank: the sums of the FP32 main parameters of a run that starts from a checkpoint."""
    from megatron_7b.checkpoint.load import load_weights

    trainer = build(config)
    load_weights(resolve_checkpoint(folder), trainer.model, trainer.optimizer)
    adams = list(trainer.optimizer.torch_optimizers())
    return sorted(p.double().sum().item() for adam in adams for group in adam.param_groups for p in group["params"])


@pytest.mark.parametrize(
    "model", [{}, {"add_qkv_bias": True, "qk_layernorm": True}, {"share_embeddings_and_output_weights": True}]
)
def test_weights_survive_the_way_through_whole_tensors(model: dict[str, Any], tmp_path: Path) -> None:
    config = tiny_config(model=model)
    four = tiny_config(model=model, parallel={"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2})
    run_ranks(4, train_save, four, tmp_path / "a", 2)
    weights = CheckpointWeights(resolve_checkpoint(tmp_path / "a"))
    table = parameter_table(config.model, VOCAB_SIZE)
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == {n: row.shape for n, row in table.items()}
    write_weights(tmp_path / "b", weights.items(), config)
    copied = CheckpointWeights(resolve_checkpoint(tmp_path / "b"))
    for name, tensor in weights.items():
        assert torch.equal(copied[name], tensor)
    for sharded in (False, True):  # a BF16 run keeps what its FP32 main parameters can hold
        bf16 = tiny_config(
            model=model, precision={"params_dtype": "bf16"}, parallel={"use_distributed_optimizer": sharded}
        )
        (sums,) = run_ranks(1, main_parameter_sums, bf16, tmp_path / "a")
        expected = sorted(tensor.double().sum().item() for tensor in weights.values())
        assert sums == pytest.approx(expected, abs=1e-9)
    (one,) = run_ranks(1, train_from, config, tmp_path / "a", 3)
    assert run_ranks(1, train_from, config, tmp_path / "b", 3) == [one]
    for results in run_ranks(4, train_from, four, tmp_path / "b", 3):
        assert [loss for loss, _ in results] == pytest.approx([loss for loss, _ in one], rel=1e-5)
    shallow = tiny_config(model={**model, "num_layers": 2}, parallel={"pipeline_model_parallel_size": 2})
    with pytest.raises(RankFailedError, match=r"tensors that this model lacks: decoder\.layers\.2\."):
        run_ranks(2, train_from, shallow, tmp_path / "a", 1)


def test_incomplete_or_foreign_weights_are_refused(tmp_path: Path) -> None:
    config = tiny_config()
    tensors = {name: torch.zeros(row.shape) for name, row in parameter_table(config.model, VOCAB_SIZE).items()}
    with pytest.raises(CheckpointError, match=r"missing: decoder\.final_norm\.weight"):
        write_weights(tmp_path, [(n, t) for n, t in tensors.items() if n != "decoder.final_norm.weight"], config)
    with pytest.raises(CheckpointError, match="no such parameter"):
        write_weights(tmp_path, [*tensors.items(), ("decoder.extra.weight", torch.zeros(1))], config)
    with pytest.raises(CheckpointError, match=r"shape \(3,\)"):
        write_weights(tmp_path, [*tensors.items(), ("decoder.final_norm.weight", torch.zeros(3))], config)
    assert not list(tmp_path.iterdir())


def test_number_formats_of_training_do_not_bind_those_who_use_the_model(tmp_path: Path) -> None:
    config = tiny_config(
        model={"transformer_impl": "auto"},
        parallel={"use_distributed_optimizer": True},
        precision={"params_dtype": "bf16", "fp8": "hybrid", "fp8_param_gather": True, "optimizer_state_dtype": "bf16"},
    )
    tensors = ((name, torch.zeros(row.shape)) for name, row in parameter_table(config.model, VOCAB_SIZE).items())
    inferred = inference_config(write_weights(tmp_path, tensors, config))
    assert not inferred.parallel.use_distributed_optimizer
    assert inferred.precision.fp8 == "hybrid"
