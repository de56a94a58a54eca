"""An adapter that the package does not know is added to a model, trained with the model frozen, saved and resumed."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_7b.checkpoint import Counters, resolve_checkpoint
from megatron_7b.config.schema import RunConfig
from megatron_7b.errors import CheckpointError
from tests.extension.lora import LORA
from tests.support.checkpoint_runs import saved_tensors, train_save
from tests.support.ranks import RankFailedError, run_ranks
from tests.support.tiny_runs import run_steps, tiny_config
from tests.training import runs

TP2 = {"tensor_model_parallel_size": 2}


def train_adapter(config: RunConfig, source: Path | None, target: Path, begin: int, end: int) -> Any:
    """Entry point of a rank: start from weights without an adapter, or resume, then train and save.

    Returns the results of the steps, how many parameters have a gradient buffer, and how many optimizer state.
    """
    from megatron_7b.checkpoint.load import load_checkpoint, load_weights
    from megatron_7b.checkpoint.save import save_checkpoint
    from megatron_7b.training.learner import build_learner

    learner = build_learner(config, "cpu", adapter=LORA)
    parts = {"chunks": learner.model, "optimizer": learner.optimizer}
    if source is not None:
        load_weights(resolve_checkpoint(source), *parts.values(), may_lack=learner.on_ranks.adapter_names)
    else:
        assert load_checkpoint(resolve_checkpoint(target), layout=learner.layout, **parts).step == begin
    results = run_steps(learner, range(begin, end))
    counters = Counters(step=end, optimizer_steps=end)
    save_checkpoint(target, counters=counters, config=config, layout=learner.layout, **parts)
    with_gradient = sum(hasattr(parameter, "main_grad") for chunk in learner.model for parameter in chunk.parameters())
    return results, with_gradient, sum(len(adam.state) for adam in learner.optimizer.torch_optimizers())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without an adapter."""
    folder = tmp_path_factory.mktemp("base")
    run_ranks(1, train_save, tiny_config(), folder, 1)
    return folder


def test_it_takes_few_lines() -> None:
    assert len((Path(__file__).parent / "lora.py").read_text().splitlines()) < 60


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [(1, {}), (2, TP2), (4, {**TP2, "use_distributed_optimizer": True})],
    ids=["one rank", "TP2", "TP2xDP2, shared"],
)
def test_an_adapter_learns_and_the_model_stays(
    world_size: int, parallel: dict[str, Any], dtype: str, base: Path, tmp_path: Path
) -> None:
    config = tiny_config(parallel=parallel, precision={"params_dtype": dtype})
    straight = run_ranks(world_size, train_adapter, config, base, tmp_path / "straight", 0, 5)
    begun = run_ranks(world_size, train_adapter, config, base, tmp_path / "resumed", 0, 3)
    resumed = run_ranks(world_size, train_adapter, config, None, tmp_path / "resumed", 3, 5)
    assert [one[0] + other[0] for one, other in zip(begun, resumed, strict=True)] == [
        results for results, *_ in straight
    ]
    for results, with_gradient, with_state in straight:
        assert with_gradient == 16  # A and B beside two linear layers in each of four layers
        assert with_state == 16 if "use_distributed_optimizer" not in parallel else 0 < with_state <= 16
        assert results[-1][0] < results[0][0]
    before = saved_tensors(base / "latest")
    after, again = (saved_tensors(tmp_path / name / "latest") for name in ("straight", "resumed"))
    assert after.keys() == again.keys()
    assert [name for name in after if not after[name].equal(again[name])] == []
    own = {name for name in after if name.endswith((".lora_a", ".lora_b"))}
    of_model = {name for name in before if not name.startswith("optimizer.")}
    assert after.keys() == own | of_model
    wanted = torch.float32 if dtype == "fp32" else torch.bfloat16
    changed = [
        name for name in of_model
        if not after[name][: before[name].shape[0]].equal(before[name][: after[name].shape[0]].to(wanted))
    ]  # fmt: skip
    assert changed == []
    assert all(bool(after[name].any()) for name in own if name.endswith("lora_b"))


def test_layouts_agree(base: Path, tmp_path: Path) -> None:
    found = [
        run_ranks(size, train_adapter, tiny_config(parallel=parallel), base, tmp_path / str(size), 0, 4)[0][0]
        for size, parallel in ((1, {}), (2, TP2))
    ]
    for (loss, norm), (other_loss, other_norm) in zip(*found, strict=True):
        assert loss == pytest.approx(other_loss, rel=1e-5)
        assert norm == pytest.approx(other_norm, rel=1e-4)


def load_strictly(config: RunConfig, source: Path) -> None:
    from megatron_7b.checkpoint.load import load_weights
    from megatron_7b.training.learner import build_learner

    learner = build_learner(config, "cpu", adapter=LORA)
    load_weights(resolve_checkpoint(source), learner.model)


def test_parameters_that_are_missing_are_refused_unless_it_is_said(base: Path) -> None:
    with pytest.raises(RankFailedError, match=f"{CheckpointError.__name__}: .* lacks 16 tensors that this model has"):
        run_ranks(1, load_strictly, tiny_config(), base)


def pretrain(config: RunConfig, run_dir: Path, *, with_adapter: bool) -> tuple[int | None, str]:
    """Entry point of a rank: `training.pretrain`, with the adapter or without."""
    import torch.distributed as dist

    from megatron_7b import training

    os.environ["RANK"] = str(dist.get_rank())
    try:
        return training.pretrain(config, run_dir, adapter=LORA if with_adapter else None), ""
    except CheckpointError as error:
        return None, str(error)


def test_a_run_with_an_adapter_starts_from_weights_and_resumes(tmp_path: Path) -> None:
    corpus = runs.write_corpus(tmp_path)
    assert run_ranks(2, runs.pretrain, runs.config(corpus), tmp_path / "base") == [(0, "")] * 2
    before = saved_tensors(tmp_path / "base" / "checkpoints" / "latest")
    for steps in (2, 4):
        config = runs.config(
            corpus, parallel=TP2, training={"train_steps": steps, "eval_interval_steps": 0},
            checkpoint={"initialize_from": str(tmp_path / "base")},
        )  # fmt: skip
        assert run_ranks(2, partial(pretrain, with_adapter=True), config, tmp_path / "run") == [(0, "")] * 2
    after = saved_tensors(tmp_path / "run" / "checkpoints" / "latest")
    assert bool(after["decoder.layers.1.mlp.linear_fc2.lora_b"].any())
    assert [name for name in before if not name.startswith("optimizer.") and not after[name].equal(before[name])] == []
    for code, message in run_ranks(2, partial(pretrain, with_adapter=False), config, tmp_path / "run"):
        assert code is None
        assert "holds 8 tensors that this model lacks: decoder.layers.0.mlp.linear_fc2.lora_a" in message
