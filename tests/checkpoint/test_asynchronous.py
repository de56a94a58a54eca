"""Checkpoints that are written while training continues: the same bytes, at any end of the run, or a clear failure."""

import contextlib
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_7b.checkpoint import latest_checkpoint, read_manifest, verify_files
from megatron_7b.config import save_config
from megatron_7b.config.schema import RunConfig
from megatron_7b.errors import MegatronError
from tests.support.checkpoint_runs import saved_tensors
from tests.support.commands import start_command
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import build, run_steps, tiny_config
from tests.training import runs

ASYNCHRONOUS = {"save_interval_steps": 1, "keep_last": 0, "asynchronous": True}
STEPS = {"train_steps": 6, "eval_interval_steps": 0}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return runs.write_corpus(tmp_path_factory.mktemp("corpus"))


def shards(checkpoint: Path) -> dict[str, bytes]:
    """Tensors, random states and indices."""
    names = (path for path in checkpoint.rglob("*") if path.suffix == ".distcp" or path.name == ".metadata")
    return {str(path.relative_to(checkpoint)): path.read_bytes() for path in names}


@pytest.mark.parametrize(
    ("world_size", "parallel", "dtype"),
    [
        (1, {}, "fp32"),
        (2, {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}, "bf16"),
        (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, "fp32"),
    ],
    ids=["one rank", "shared optimizer with overlap", "TP2xPP2"],
)
def test_every_checkpoint_has_the_same_bytes(
    world_size: int, parallel: dict[str, Any], dtype: str, corpus: str, tmp_path: Path
) -> None:
    for name, asynchronous in (("sync", False), ("async", True)):
        config = runs.config(
            corpus, training=STEPS, parallel=parallel, precision={"params_dtype": dtype},
            checkpoint={**ASYNCHRONOUS, "asynchronous": asynchronous},
        )  # fmt: skip
        assert run_ranks(world_size, runs.pretrain, config, tmp_path / name) == [(0, "")] * world_size
    losses = [[line["loss"] for line in runs.steps(tmp_path / name)] for name in ("sync", "async")]
    assert losses[0] == losses[1]
    expected, found = (sorted((tmp_path / name / "checkpoints").glob("step_*")) for name in ("sync", "async"))
    assert [path.name for path in found] == [f"step_{step:08d}" for step in range(1, 7)]
    for one, other in zip(expected, found, strict=True):
        assert shards(one) == shards(other)
        verify_files(other, read_manifest(other).files)
    assert (tmp_path / "async" / "checkpoints" / "latest").resolve() == found[-1].resolve()


def save_held_up(config: RunConfig, folder: Path) -> None:
    """Entry point of a rank: writing begins only once two more steps are done."""
    import threading

    from megatron_7b.checkpoint import Counters, save
    from megatron_7b.parallel.groups import new_background_group

    trainer, may_write = build(config), threading.Event()
    parts = {"chunks": trainer.model, "optimizer": trainer.optimizer, "config": config, "layout": trainer.layout}
    run_steps(trainer, range(1))
    save.save_checkpoint(folder / "at once", counters=Counters(step=1, optimizer_steps=1), **parts)
    write_shard = save.write_shard

    def late(*arguments: Any) -> Any:
        may_write.wait()
        return write_shard(*arguments)

    save.write_shard = late
    group = new_background_group()
    pending = save.begin_save(folder / "late", counters=Counters(step=1, optimizer_steps=1), background=group, **parts)
    run_steps(trainer, range(1, 3))
    assert not pending.is_done()
    may_write.set()
    assert pending.wait() == folder / "late" / "step_00000001"
    assert pending.is_done()
    save.write_shard = write_shard


@pytest.mark.parametrize("parallel", [{}, {"use_distributed_optimizer": True}], ids=["whole", "shared"])
def test_later_steps_do_not_reach_what_is_being_written(parallel: dict[str, Any], tmp_path: Path) -> None:
    for name in ("at once", "late"):
        (tmp_path / name).mkdir()
    run_ranks(2, save_held_up, tiny_config(parallel=parallel, precision={"params_dtype": "bf16"}), tmp_path)
    at_once, late = (shards(tmp_path / name / "latest") for name in ("at once", "late"))
    assert at_once == late


def pretrain_with_small_files(config: RunConfig, run_dir: Path, rank: int, max_file_bytes: int) -> Any:
    """Entry point of a rank: one rank cannot write a large file."""
    import torch.distributed as dist

    if dist.get_rank() == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, resource.RLIM_INFINITY))
    return runs.pretrain(config, run_dir)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_file_that_cannot_be_written_ends_the_run_and_leaves_nothing(rank: int, corpus: str, tmp_path: Path) -> None:
    config = runs.config(
        corpus, training={**STEPS, "train_steps": 1000}, checkpoint={**ASYNCHRONOUS, "save_interval_steps": 2}
    )
    outcomes = run_ranks(2, pretrain_with_small_files, config, tmp_path / "run", rank, 30_000)
    assert len({message for _, message in outcomes}) == 1
    (code, message), _ = outcomes
    assert code is None
    assert (
        f"CheckpointError: the checkpoint of step 2 could not be written to {tmp_path / 'run' / 'checkpoints'}: "
        in message
    )
    assert f"rank {rank}: " in message
    assert f"__{rank}_0.distcp: File too large; it takes about" in message
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    assert runs.status(tmp_path / "run")["state"] == "failed"


def stop_after(step: int, action: Callable[[Any], None]) -> Any:
    from megatron_7b.training.hooks import Hook

    class Stop(Hook):
        def after_step(self, run: Any, metrics: Any) -> None:
            if metrics.step == step:
                action(run)

    return Stop()


def fail(run: Any) -> None:
    raise MegatronError("enough")


def fail_on_one_rank(run: Any) -> None:
    with run.ranks.together("failing"):
        if run.ranks.rank == 1:
            raise MegatronError("enough")


def pretrain_until(config: RunConfig, run_dir: Path, step: int, action: Callable[[Any], None]) -> Any:
    """Entry point of a rank: a slow disk, so that the save before is in progress when something ends the run."""
    import torch.distributed as dist

    from megatron_7b import training
    from megatron_7b.checkpoint import save

    write_shard = save.write_shard

    def slow(*arguments: Any) -> Any:
        time.sleep(0.5)
        return write_shard(*arguments)

    save.write_shard = slow
    os.environ["RANK"] = str(dist.get_rank())
    try:
        return training.pretrain(config, run_dir, hooks=[stop_after(step, action)]), ""
    except MegatronError as error:
        return None, str(error)


@pytest.mark.parametrize(
    ("action", "saved"), [(fail, 2), (fail_on_one_rank, 3)], ids=["all ranks fail", "one fails, and all know"]
)
def test_a_run_that_fails_still_publishes_what_it_was_writing(
    action: Callable[[Any], None], saved: int, corpus: str, tmp_path: Path
) -> None:
    config = runs.config(corpus, training=STEPS, checkpoint={**ASYNCHRONOUS, "save_interval_steps": 2})
    for code, message in run_ranks(2, pretrain_until, config, tmp_path, 3, action):
        assert code is None
        assert "enough" in message
    newest = latest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None
    assert read_manifest(newest).counters.step == saved
    assert f'"step": {saved}' in (tmp_path / "saved.json").read_text()
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob(".*")) == []


def move(run: Any) -> None:
    if run.ranks.is_main:
        run.folder.root.rename(run.folder.root.with_name("new"))
    run.ranks.maximum(0)


def test_a_folder_that_is_moved_during_a_save_gets_the_next_one(corpus: str, tmp_path: Path) -> None:
    config = runs.config(corpus, training=STEPS, checkpoint={**ASYNCHRONOUS, "save_interval_steps": 2})
    for code, message in run_ranks(2, pretrain_until, config, tmp_path / "run", 3, move):
        assert code is None
        assert f"the run folder was moved to {tmp_path / 'new'}" in message
    assert not (tmp_path / "run").exists()
    checkpoints = tmp_path / "new" / "checkpoints"
    newest = latest_checkpoint(checkpoints)
    assert newest == checkpoints / "step_00000004"
    verify_files(newest, read_manifest(newest).files)
    assert list(checkpoints.glob(".*")) == []


def save_into_moved(config: RunConfig, folder: Path) -> str:
    """Entry point of a rank: the folder moves between the beginning of a save and its end."""
    import torch.distributed as dist

    from megatron_7b.checkpoint import Counters
    from megatron_7b.checkpoint.save import begin_save

    trainer = build(config)
    pending = begin_save(
        folder / "checkpoints", chunks=trainer.model, optimizer=trainer.optimizer, counters=Counters(step=1),
        config=config, layout=trainer.layout,
    )  # fmt: skip
    if dist.get_rank() == 0:
        folder.rename(folder.with_name("new"))
    dist.barrier()
    try:
        return str(pending.wait())
    except MegatronError as error:
        return str(error)


def test_a_folder_that_is_moved_during_a_save_is_one_error_on_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (message,) = set(run_ranks(2, save_into_moved, tiny_config(), tmp_path / "run"))
    assert message.startswith(f"the checkpoint of step 1 could not be written to {tmp_path / 'run' / 'checkpoints'}: ")
    assert "No such file or directory" in message


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_kill_at_any_moment_leaves_complete_checkpoints(corpus: str, tmp_path: Path) -> None:
    """Five lives of one run that saves all the time, each ended by SIGKILL; then one that ends by itself."""
    config = runs.config(
        corpus, training={**STEPS, "train_steps": 1_000_000}, checkpoint={**ASYNCHRONOUS, "keep_last": 2}
    )
    save_config(config, tmp_path / "run.yaml")
    words = ["pretrain", "--config", str(tmp_path / "run.yaml"), "--run-dir", str(tmp_path / "run"), "--nproc", "1"]
    checkpoints, draw, newest = tmp_path / "run" / "checkpoints", random.Random(5), 0
    for _ in range(5):
        process = start_command(words, tmp_path / "out", tmp_path / "err", tmp_path, dict(os.environ))
        wait_for_step(checkpoints, newest + 2, process)
        time.sleep(draw.uniform(0.0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        complete = latest_checkpoint(checkpoints)
        assert complete is not None
        verify_files(complete, read_manifest(complete).files)
        assert read_manifest(complete).counters.step >= newest + 2
        newest = read_manifest(complete).counters.step
    steps = ["--training.train-steps", str(newest + 2)]
    process = start_command([*words, *steps], tmp_path / "out", tmp_path / "err", tmp_path, dict(os.environ))
    process.join()
    assert process.exitcode == 0, (tmp_path / "err").read_text()
    assert list(checkpoints.glob(".*")) == []
    assert saved_tensors(checkpoints / f"step_{newest + 2:08d}")
    shutil.rmtree(tmp_path / "run")


def wait_for_step(checkpoints: Path, step: int, process: Any) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.is_alive():
        with contextlib.suppress(OSError):
            if int((checkpoints / "latest").readlink().name.removeprefix("step_")) >= step:
                return
        time.sleep(0.01)
    raise AssertionError(f"no step {step}: {process.exitcode}")
