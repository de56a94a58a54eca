"""The optimizer's state through other layouts and forms: saved, loaded and saved again, it is the same bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_7b.checkpoint import Counters, resolve_checkpoint
from megatron_7b.config.schema import RunConfig
from tests.support.checkpoint_runs import load_save, saved_tensors, train_save
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import VOCAB_SIZE, build, tiny_config

NUM_STEPS = 3
SHARED: dict[str, Any] = {"use_distributed_optimizer": True}
TP2_PP2: dict[str, Any] = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
TIED = {"share_embeddings_and_output_weights": True}


def cropped(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the rows that pad the vocabulary, which differ in number between layouts."""
    return {
        name: tensor[:VOCAB_SIZE] if "word_embeddings" in name or "output_layer" in name else tensor
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize(
    ("model", "dtype", "source", "target"),
    [
        ({}, "bf16", (4, TP2_PP2 | SHARED), (3, SHARED)),
        ({}, "bf16", (3, SHARED), (2, {})),
        ({}, "fp32", (2, {}), (4, TP2_PP2 | SHARED)),
        (TIED, "bf16", (2, {"pipeline_model_parallel_size": 2} | SHARED), (2, SHARED)),
        (TIED, "fp32", (2, SHARED), (4, TP2_PP2)),
    ],
    ids=["TP2xPP2 shared to DP3 shared", "DP3 shared to DP2", "DP2 to TP2xPP2 shared", "tied, PP2", "tied, TP2xPP2"],
)
def test_another_layout_and_back_to_disk(
    model: dict[str, Any],
    dtype: str,
    source: tuple[int, dict[str, Any]],
    target: tuple[int, dict[str, Any]],
    tmp_path: Path,
) -> None:
    saved = []
    for number, (world_size, parallel) in enumerate((source, target)):
        config = tiny_config(
            model=model, parallel=parallel, precision={"params_dtype": dtype}, training={"global_batch_size": 12}
        )
        if number == 0:
            run_ranks(world_size, train_save, config, tmp_path / "0", NUM_STEPS)
        else:
            run_ranks(world_size, load_save, config, tmp_path / "0", tmp_path / "1")
        saved.append(cropped(saved_tensors(tmp_path / str(number) / "latest")))
    first, second = saved
    assert first.keys() == second.keys()
    kinds = {name.split(".")[2] for name in first if name.startswith("optimizer.")}
    assert kinds == {"exp_avg", "exp_avg_sq"} | ({"param"} if dtype == "bf16" else set())
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert all(bool(tensor.any()) for name, tensor in first.items() if ".exp_avg" in name)


def test_a_bf16_run_takes_its_main_parameters_from_an_fp32_one(tmp_path: Path) -> None:
    run_ranks(1, train_save, tiny_config(), tmp_path / "fp32", NUM_STEPS)
    config = tiny_config(parallel=SHARED, precision={"params_dtype": "bf16"})
    run_ranks(2, load_save, config, tmp_path / "fp32", tmp_path / "bf16")
    before, after = (saved_tensors(tmp_path / dtype / "latest") for dtype in ("fp32", "bf16"))
    for name in [name for name in before if not name.startswith("optimizer.")]:
        assert torch.equal(after[f"optimizer.state.param.{name}"], before[name])
        assert torch.equal(after[name], before[name].bfloat16())
        assert torch.equal(after[f"optimizer.state.exp_avg.{name}"], before[f"optimizer.state.exp_avg.{name}"])


def start_save(config: RunConfig, source: Path, target: Path) -> None:
    """Entry point of a rank: start from the weights of a checkpoint, and save before the first step."""
    from megatron_7b.checkpoint.load import load_weights
    from megatron_7b.checkpoint.save import save_checkpoint

    trainer = build(config)
    load_weights(resolve_checkpoint(source), trainer.model, trainer.optimizer)
    save_checkpoint(
        target,
        chunks=trainer.model,
        optimizer=trainer.optimizer,
        counters=Counters(),
        config=config,
        layout=trainer.layout,
    )


@pytest.mark.parametrize("entry", [load_save, start_save], ids=["resumed", "started from its weights"])
@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [(1, {}), (2, {"tensor_model_parallel_size": 2}), (2, SHARED), (4, TP2_PP2 | SHARED)],
    ids=["one rank", "TP2", "DP2 shared", "TP2xPP2 shared"],
)
def test_fp32_main_parameters_of_a_bf16_run_are_kept(
    entry: Callable[..., None], world_size: int, parallel: dict[str, Any], tmp_path: Path
) -> None:
    """As FP32 weights, as main parameters of a run that stays in BF16, and on the way through FP32 and back."""

    def config(dtype: str, **parallel: Any) -> RunConfig:
        return tiny_config(parallel=parallel, precision={"params_dtype": dtype})

    run_ranks(2, train_save, config("bf16", **SHARED), tmp_path / "bf16", NUM_STEPS)
    run_ranks(world_size, entry, config("fp32", **parallel), tmp_path / "bf16", tmp_path / "fp32")
    run_ranks(world_size, entry, config("bf16", **parallel), tmp_path / "bf16", tmp_path / "bf16 again")
    run_ranks(1, entry, config("bf16"), tmp_path / "fp32", tmp_path / "back")
    before, fp32, again, back = (
        cropped(saved_tensors(tmp_path / name / "latest")) for name in ("bf16", "fp32", "bf16 again", "back")
    )
    names = [name for name in before if not name.startswith("optimizer.")]
    assert any(not torch.equal(before[f"optimizer.state.param.{name}"], before[name].float()) for name in names)
    for name in names:
        main = before[f"optimizer.state.param.{name}"]
        assert torch.equal(fp32[name], main)
        assert f"optimizer.state.param.{name}" not in fp32
        for narrow in (again, back):
            assert torch.equal(narrow[f"optimizer.state.param.{name}"], main)
            assert torch.equal(narrow[name], before[name])


def test_whoever_only_computes_with_a_bf16_run_has_its_bf16_weights(tmp_path: Path) -> None:
    """So that an evaluation gives the loss that its own validation gave, and an export what it computed with."""
    run_ranks(1, train_save, tiny_config(precision={"params_dtype": "bf16"}), tmp_path, NUM_STEPS)
    before = cropped(saved_tensors(tmp_path / "latest"))
    ((found),) = run_ranks(1, weights_for_inference, tmp_path)
    assert found == {
        name: tensor.double().sum().item() for name, tensor in before.items() if not name.startswith("optimizer.")
    }


def weights_for_inference(folder: Path) -> dict[str, float]:
    """Entry point of a rank: the sum of each FP32 weight that a checkpoint was loaded into without an optimizer."""
    from megatron_7b.checkpoint.load import load_weights
    from megatron_7b.model.builder import named_canonical_parameters

    trainer = build(tiny_config())
    load_weights(resolve_checkpoint(folder), trainer.model)
    named = named_canonical_parameters([chunk.module for chunk in trainer.model])
    sums = {name: tensor.double() for name, tensor in named}
    return {
        name: (tensor[:VOCAB_SIZE] if tensor.shape[0] > VOCAB_SIZE else tensor).sum().item()
        for name, tensor in sums.items()
    }
