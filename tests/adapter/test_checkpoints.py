"""Checkpoints of adapters hold what was trained, name the model that it belongs to, and work wherever that is."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_7b.checkpoint import Counters, read_manifest, resolve_checkpoint
from megatron_7b.checkpoint.base import TrainedPart, describe_base, find_base, find_base_to_resume
from megatron_7b.checkpoint.inference_config import inference_config
from megatron_7b.checkpoint.weights import CheckpointWeights
from megatron_7b.config.schema import RunConfig
from megatron_7b.errors import CheckpointError
from tests.support.checkpoint_runs import saved_tensors
from tests.support.commands import run_command
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import tiny_config
from tests.training import runs

DORA: dict[str, Any] = {
    "method": "dora", "rank": 2, "dropout": 0.1,
    "target_modules": ("q_proj", "o_proj", "up_proj"), "modules_to_save": ("lm_head",),
}  # fmt: skip
SHARED = {"use_distributed_optimizer": True}


def train(
    folder: Path, name: str, steps: int, *, ranks: int = 2, adapter: dict[str, Any] = DORA, **parallel: Any
) -> list[tuple[int | None, str]]:
    config = runs.config(
        str(folder / "corpus_text_document"), parallel=parallel, adapter=adapter,
        training={"train_steps": steps, "eval_interval_steps": 0}, optimizer={"lr_decay_style": "constant"},
        checkpoint={"initialize_from": str(folder / "base"), "save_interval_steps": 0},
    )  # fmt: skip
    return run_ranks(ranks, runs.pretrain, config, folder / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a whole model, `base`, and one of an adapter beside it, `run`."""
    path = tmp_path_factory.mktemp("adapters")
    corpus = runs.write_corpus(path)
    assert run_ranks(1, runs.pretrain, runs.config(corpus), path / "base") == [(0, "")]
    assert train(path, "run", 4, **SHARED) == [(0, "")] * 2
    return path


def test_it_holds_what_was_trained_and_resumes_bit_for_bit(folder: Path) -> None:
    for steps in (2, 4):
        assert train(folder, "resumed", steps, **SHARED) == [(0, "")] * 2
    straight, resumed = (saved_tensors(folder / name / "checkpoints" / "latest") for name in ("run", "resumed"))
    assert straight.keys() == resumed.keys()
    assert [name for name in straight if not straight[name].equal(resumed[name])] == []
    parameters = {name for name in straight if not name.startswith("optimizer.")}
    layer = {
        f"decoder.layers.{number}.{projection}.{part}"
        for number in range(2)
        for projection in (
            "self_attention.linear_qkv.q_proj", "self_attention.linear_proj.o_proj", "mlp.linear_fc1.up_proj"
        )
        for part in ("lora_A", "lora_B", "lora_magnitude_vector")
    }  # fmt: skip
    assert parameters == layer | {"output_layer.weight"}
    kinds = {name.split(".")[2] for name in straight.keys() - parameters}
    assert kinds == {"exp_avg", "exp_avg_sq"}
    before = saved_tensors(folder / "base" / "checkpoints" / "latest")["output_layer.weight"]
    assert not straight["output_layer.weight"][: runs.VOCAB_SIZE].equal(before[: runs.VOCAB_SIZE])


def test_every_layout_continues_alike(folder: Path) -> None:
    found = []
    layouts: list[tuple[int, dict[str, Any]]] = [
        (1, {}),
        (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        (2, {"pipeline_model_parallel_size": 2}),
    ]
    for ranks, parallel in layouts:
        name = f"run of {'-'.join(parallel)}"
        shutil.copytree(folder / "run", folder / name, symlinks=True)
        adapter = {**DORA, "dropout": 0.0}  # which draws other numbers at every layout
        assert train(folder, name, 6, ranks=ranks, adapter=adapter, **parallel) == [(0, "")] * ranks
        found.append([line["loss"] for line in runs.metrics(folder / name) if "loss" in line][-2:])
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-5)


def test_the_base_is_found_where_it_is(folder: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    both.mkdir()
    for name in ("base", "run"):
        shutil.copytree(folder / name, both / name, symlinks=True)
    checkpoint = resolve_checkpoint(both / "run")
    assert find_base(checkpoint) == resolve_checkpoint(both / "base")  # the copy beside it, not the original
    manifest = read_manifest(checkpoint)
    assert manifest.base is not None
    assert Path(manifest.base.path) == resolve_checkpoint(folder / "base")
    (both / "base").rename(tmp_path / "elsewhere")
    assert find_base(checkpoint) == resolve_checkpoint(folder / "base")
    assert find_base(checkpoint, tmp_path / "elsewhere") == resolve_checkpoint(tmp_path / "elsewhere")
    assert find_base(resolve_checkpoint(folder / "base")) is None


def test_another_base_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "run", tmp_path / "run", symlinks=True)
    other = runs.config(runs.write_corpus(tmp_path), training={"train_steps": 1, "seed": 8})
    assert run_ranks(1, runs.pretrain, other, tmp_path / "base") == [(0, "")]
    (folder / "base").rename(folder / "away")
    try:
        done = run_command("generate", "--checkpoint", tmp_path / "run", "--prompt", "x")
        ((code, message),) = train(tmp_path, "run", 6, ranks=1)
    finally:
        (folder / "away").rename(folder / "base")
    assert (done.returncode, code) == (1, None)
    assert f"{folder / 'base'} does not exist" in done.stderr
    for text in (done.stderr, message):
        assert f"{tmp_path / 'base'}/checkpoints/step_00000006 does not exist" in text
        assert "--checkpoint.initialize-from (of convert: --base) FOLDER names the checkpoint with that model" in text
    assert f"{tmp_path / 'base'} holds other weights" in message

    # Where the right one still is, what is asked for is not silently replaced by it.
    checkpoint, asked = ("--checkpoint", tmp_path / "run"), ("--checkpoint.initialize-from", tmp_path / "base")
    commands: list[tuple[object, ...]] = [
        ("generate", *checkpoint, *asked, "--prompt", "x"),
        ("evaluate", *checkpoint, *asked, "--data", folder / "corpus_text_document"),
        ("convert", "to-hf", *checkpoint, "--output", tmp_path / "hf", "--merge", "--base", tmp_path / "base"),
        ("generate", *checkpoint, "--checkpoint.initialize-from", tmp_path / "nothing", "--prompt", "x"),
    ]
    told = [run_command(*command).stderr for command in commands]
    ((code, message),) = train(tmp_path, "run", 6, ranks=1)
    assert code is None
    for text in (*told, message):
        assert f"{tmp_path / ('nothing' if text is told[-1] else 'base')} " in text
        assert ("does not exist; " if text is told[-1] else "holds other weights; ") in text
        assert f"{folder / 'base' / 'checkpoints' / 'step_00000006'} is that model" in text
    assert not (tmp_path / "hf").exists()


def test_a_run_whose_base_has_gone_on_stays_beside_what_it_began_with(tmp_path: Path) -> None:
    corpus = runs.write_corpus(tmp_path)
    for steps in (1, 2):
        longer = runs.config(corpus, training={"train_steps": steps}, optimizer={"lr_decay_style": "constant"})
        assert run_ranks(1, runs.pretrain, longer, tmp_path / "base") == [(0, "")]
        assert train(tmp_path, "run", steps, ranks=1) == [(0, "")]
    checkpoint = resolve_checkpoint(tmp_path / "run")
    begun, now = (tmp_path / "base" / "checkpoints" / f"step_{step:08d}" for step in (1, 2))
    assert resolve_checkpoint(tmp_path / "base") == now
    for named in ("base", "base/checkpoints", "base/checkpoints/latest", "base/checkpoints/step_00000002"):
        assert find_base_to_resume(checkpoint, tmp_path / named) == begun
    shutil.copytree(now, tmp_path / "elsewhere" / now.name)
    with pytest.raises(CheckpointError, match=f"elsewhere holds other weights(.|\n)*{begun} is that model"):
        find_base_to_resume(checkpoint, tmp_path / "elsewhere")


def test_an_adapter_is_no_whole_model(folder: Path, tmp_path: Path) -> None:
    config = runs.config(
        str(folder / "corpus_text_document"), checkpoint={"initialize_from": str(folder / "run")}
    )  # fmt: skip
    ((code, message),) = run_ranks(1, runs.pretrain, config, tmp_path / "new")
    done = run_command(
        "convert", "grow", "--checkpoint", folder / "run", "--output", tmp_path / "grown", "--num-layers", 4
    )
    assert (done.returncode, code) == (1, None)
    for text in (done.stderr, message):
        assert f"run/checkpoints/step_00000004 holds an adapter only, trained beside {folder}" in text
        assert "--merge" in text
    assert not (tmp_path / "grown").exists()


@pytest.mark.parametrize("run", ["run", "base"])
def test_a_run_keeps_its_adapter(run: str, folder: Path) -> None:
    ((code, message),) = train(folder, run, 6, ranks=1, adapter={**DORA, "rank": 3})
    assert code is None
    assert "adapter.rank: the folder has" in message


def save_with_head(config: RunConfig, base: Path | None, folder: Path) -> dict[str, float]:
    """Entry point of a rank: save a model, or what is trained beside one; return a sum of each parameter."""
    from megatron_7b.checkpoint.load import load_base
    from megatron_7b.checkpoint.save import save_checkpoint
    from megatron_7b.model.builder import named_canonical_parameters
    from megatron_7b.training.learner import build_learner

    learner, part = build_learner(config, "cpu"), None
    chunks, names = learner.on_ranks.chunks, learner.on_ranks.names_apart
    if base is not None and names is not None:
        load_base(base, learner.on_ranks, learner.model)
        part = TrainedPart(names, describe_base(base))
        for parameter in filter(lambda one: one.requires_grad, learner.model[0].parameters()):
            parameter.data += 1.0
    where = {"layout": learner.layout, "part": part}
    save_checkpoint(folder, chunks=learner.model, optimizer=None, counters=Counters(), config=config, **where)
    return {name: float(parameter.detach().double().sum()) for name, parameter in named_canonical_parameters(chunks)}


def load_sums(folder: Path, overrides: dict[str, Any]) -> dict[str, float]:
    """Entry point of a rank: open a checkpoint to compute with it, and return the same sums."""
    from megatron_7b.checkpoint.open_model import opened_model
    from megatron_7b.model.builder import named_canonical_parameters

    with opened_model(folder, inference_config(folder, overrides)) as model:
        return {name: float(one.detach().double().sum()) for name, one in named_canonical_parameters(model.chunks)}


def test_a_head_is_part_of_it_and_the_adapter_can_be_left_out(tmp_path: Path) -> None:
    """The weights have no pooler, so that it must come with the adapter, as the head does."""
    encoder = {"architecture": "bert", "num_query_groups": None, "num_tokentypes": 2}
    head = {**encoder, "head": "sequence_classification", "num_labels": 3}
    (before,) = run_ranks(1, save_with_head, tiny_config(model=encoder), None, tmp_path / "base")
    base = resolve_checkpoint(tmp_path / "base")
    config = tiny_config(model=head, adapter={"method": "bottleneck"}, checkpoint={"initialize_from": str(base)})
    (saved,) = run_ranks(1, save_with_head, config, base, tmp_path / "adapter")
    folder = resolve_checkpoint(tmp_path / "adapter")
    assert run_ranks(1, load_sums, folder, {}) == [saved]
    assert {name for name in saved if saved[name] == before.get(name)} == before.keys() & saved.keys()
    parts = {name.split(".")[0] for name in CheckpointWeights(folder)}
    assert parts == {"encoder", "pooler", "task_head"}

    decoder = {"adapter": {"method": "lora"}, "checkpoint": {"initialize_from": str(tmp_path / "text")}}
    (before,) = run_ranks(1, save_with_head, tiny_config(), None, tmp_path / "text")
    base = resolve_checkpoint(tmp_path / "text")
    run_ranks(1, save_with_head, tiny_config(**decoder), base, tmp_path / "lora")
    assert run_ranks(1, load_sums, resolve_checkpoint(tmp_path / "lora"), {"adapter.method": "none"}) == [before]
