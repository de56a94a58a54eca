"""What may happen to a run folder between and during the lives of its run: nothing is lost, and nothing is silent."""

import json
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_7b.checkpoint import read_manifest
from megatron_7b.config.schema import RunConfig
from tests.support.checkpoint_runs import saved_tensors
from tests.support.ranks import run_ranks
from tests.support.small_disk import remount, small_disk
from tests.training import runs

ENDLESS = {"train_steps": 100_000, "eval_interval_steps": 0}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return runs.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def finished(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of six steps, with checkpoints of steps 3 and 6."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    assert run_ranks(2, runs.pretrain, runs.config(corpus), run_dir) == [(0, ""), (0, "")]
    return run_dir


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run", symlinks=True))


def contents(folder: Path) -> dict[str, bytes | str]:
    return {
        str(path.relative_to(folder)): str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def all_manifests(checkpoints: Path) -> None:
    for path in checkpoints.glob("step_*/checkpoint.json"):
        path.unlink()


def newest_manifest(checkpoints: Path) -> None:
    (checkpoints / "step_00000006" / "checkpoint.json").unlink()


def no_folder(checkpoints: Path) -> None:
    shutil.rmtree(checkpoints)


def empty_folder(checkpoints: Path) -> None:
    """As the mount point of a disk that is not mounted."""
    shutil.rmtree(checkpoints)
    checkpoints.mkdir()


def only_latest(checkpoints: Path) -> None:
    for path in checkpoints.glob("step_*"):
        shutil.rmtree(path)


def dangling_link(checkpoints: Path) -> None:
    checkpoints.rename(checkpoints.with_name("elsewhere"))
    checkpoints.symlink_to("/not/mounted")


def a_file(checkpoints: Path) -> None:
    shutil.rmtree(checkpoints)
    checkpoints.write_text("")


def copied_under_another_number(checkpoints: Path) -> None:
    shutil.copytree(checkpoints / "step_00000003", checkpoints / "step_00000050")


@pytest.mark.parametrize(
    ("lose", "words"),
    [
        (newest_manifest, "step_00000006 is damaged"),
        (all_manifests, "step_00000006 is damaged"),
        (no_folder, "saved.json says that step 6 was saved"),
        (empty_folder, "saved.json says that step 6 was saved"),
        (only_latest, "latest points to step_00000006"),
        (dangling_link, "checkpoints is a link to something that is not there"),
        (a_file, "checkpoints is a file"),
        (copied_under_another_number, "holds the checkpoint of step 3, not of step 50"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_run_that_was_saved_does_not_start_over(
    lose: Callable[[Path], None], words: str, corpus: str, run_dir: Path
) -> None:
    lose(run_dir / "checkpoints")
    before = contents(run_dir)
    config = runs.config(corpus, training={"train_steps": 8})
    for code, message in run_ranks(2, runs.pretrain, config, run_dir):
        assert code is None
        assert words in message
    assert contents(run_dir) == before


def test_status_alone_tells_of_a_save(corpus: str, run_dir: Path) -> None:
    no_folder(run_dir / "checkpoints")
    (run_dir / "saved.json").unlink()
    for _, message in run_ranks(2, runs.pretrain, runs.config(corpus), run_dir):
        assert "status.json says that step 6 was saved" in message


def test_a_run_that_never_saved_starts_over_and_keeps_its_history(corpus: str, finished: Path, run_dir: Path) -> None:
    """As after kill -9 before the first save, and during it."""
    no_folder(run_dir / "checkpoints")
    (run_dir / "checkpoints" / ".tmp-step_00000006-0123abcd").mkdir(parents=True)
    (run_dir / "saved.json").unlink()
    (run_dir / "status.json").write_text('{"state": "running", "exit_code": null, "step": 6}\n')
    before = (run_dir / "metrics.jsonl").read_text()
    assert run_ranks(2, runs.pretrain, runs.config(corpus), run_dir) == [(0, ""), (0, "")]
    assert (run_dir / "metrics.repeated.jsonl").read_text() == before
    assert [line["loss"] for line in runs.steps(run_dir)] == [line["loss"] for line in runs.steps(finished)]
    assert "did steps here and saved none: starting over" in (run_dir / "train.log").read_text()
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [
        "latest", "step_00000003", "step_00000006"
    ]  # fmt: skip


def test_a_rollback_keeps_what_is_done_again(corpus: str, finished: Path, run_dir: Path) -> None:
    shutil.rmtree(run_dir / "checkpoints" / "step_00000006")
    assert run_ranks(2, runs.pretrain, runs.config(corpus), run_dir) == [(0, ""), (0, "")]
    assert [line["loss"] for line in runs.steps(run_dir)] == [line["loss"] for line in runs.steps(finished)]
    aside = [json.loads(line) for line in (run_dir / "metrics.repeated.jsonl").read_text().splitlines()]
    assert aside == [line for line in runs.metrics(finished) if line["step"] > 3]


def test_a_checkpoint_that_is_ahead_of_the_metrics_is_resumed_from_and_named(
    corpus: str, finished: Path, run_dir: Path
) -> None:
    """Somebody copied it here, or a power cut took the metrics."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text("".join(lines[:2]))
    assert run_ranks(2, runs.pretrain, runs.config(corpus, training={"train_steps": 7}), run_dir) == [(0, "")] * 2
    assert [line["step"] for line in runs.steps(run_dir)] == [1, 2, 7]
    assert "ends at step 2, but the newest checkpoint is of step 6" in (run_dir / "train.log").read_text()


@pytest.mark.parametrize("damage", ["empty", "cut", "garbled", "binary", "folder"])
def test_a_damaged_configuration_is_named_and_may_be_deleted(damage: str, corpus: str, run_dir: Path) -> None:
    path = run_dir / "config.yaml"
    text = path.read_text()
    if damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        content = {"empty": "", "cut": text[: text.index("ffn_hidden")], "garbled": text.replace(":", "{")}
        path.write_bytes(content.get(damage, "").encode() if damage != "binary" else bytes(range(256)))
    for code, message in run_ranks(2, runs.pretrain, runs.config(corpus), run_dir):
        assert code is None
        assert str(path) in message
        assert f"delete {path}" in message
        assert "another shape" not in message
    (path.rmdir if damage == "folder" else path.unlink)()
    assert run_ranks(2, runs.pretrain, runs.config(corpus), run_dir) == [(0, ""), (0, "")]
    assert path.read_text() == text


def pretrain_while(
    run: RunConfig, run_dir: Path, step: int, event: Callable[..., None], *arguments: Any
) -> tuple[int | None, str]:
    """Entry point of a rank: as `runs.pretrain`, but rank 0 has something happen once metrics.jsonl has a step."""
    import torch.distributed as dist

    def wait() -> None:
        while not any(line.get("step") == step for line in runs.metrics(run_dir)):
            time.sleep(0.002)
        event(*arguments)

    if dist.get_rank() == 0:
        threading.Thread(target=wait, daemon=True).start()
    return runs.pretrain(run, run_dir)


def rename(source: Path, target: Path) -> None:
    source.rename(target)


def delete(folder: Path) -> None:
    while folder.exists():  # a file may appear while others are removed
        shutil.rmtree(folder, ignore_errors=True)


def test_a_folder_that_is_moved_away_is_followed_and_the_run_ends(corpus: str, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    config = runs.config(corpus, training=ENDLESS, optimizer={"lr_decay_steps": 6})
    for code, message in run_ranks(2, pretrain_while, config, old, 2, rename, old, new):
        assert code is None
        assert f"the run folder was moved to {new} while the run was in progress" in message
        assert f"continue with --run-dir {new}" in message
    assert not old.exists()
    step = runs.steps(new)[-1]["step"]
    assert read_manifest(new / "checkpoints" / "latest").counters.step == step
    assert runs.status(new) == {"state": "failed", "exit_code": 1, "step": step}
    assert [path.name for path in new.rglob("*tmp*")] == []
    # There it continues as if nothing had been.
    training = {"train_steps": step + 2, "eval_interval_steps": 0}
    longer = runs.config(corpus, training=training, optimizer={"lr_decay_steps": 6})
    assert run_ranks(2, runs.pretrain, longer, new) == [(0, ""), (0, "")]
    assert run_ranks(2, runs.pretrain, longer, tmp_path / "straight") == [(0, ""), (0, "")]
    found, expected = (saved_tensors(folder / "checkpoints" / "latest") for folder in (new, tmp_path / "straight"))
    assert [name for name in expected if not found[name].equal(expected[name])] == []


def test_a_folder_that_is_deleted_ends_the_run_and_is_not_brought_back(corpus: str, tmp_path: Path) -> None:
    config = runs.config(corpus, training=ENDLESS)
    for code, message in run_ranks(2, pretrain_while, config, tmp_path / "run", 2, delete, tmp_path / "run"):
        assert code is None
        assert "was deleted while the run was in progress" in message
    assert not (tmp_path / "run").exists()


def test_a_link_to_the_folder_may_be_changed(corpus: str, tmp_path: Path) -> None:
    """The run stays with the folder, not with whatever its name leads to by now."""
    (tmp_path / "real").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "next").symlink_to("other")
    config = runs.config(corpus, training={"train_steps": 30, "eval_interval_steps": 0})
    change = rename, tmp_path / "next", tmp_path / "link"
    assert run_ranks(2, pretrain_while, config, tmp_path / "link", 2, *change) == [(0, ""), (0, "")]
    assert (tmp_path / "link").resolve().name == "other"
    assert not list((tmp_path / "other").iterdir())
    assert runs.status(tmp_path / "real") == {"state": "finished", "exit_code": 0, "step": 30}
    assert read_manifest(tmp_path / "real" / "checkpoints" / "latest").counters.step == 30


def test_losing_the_lock_file_alone_is_no_move(corpus: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    config = runs.config(corpus, training={"train_steps": 30, "eval_interval_steps": 0})
    outcomes = run_ranks(2, pretrain_while, config, run_dir, 2, delete_file, run_dir / ".lock")
    assert outcomes == [(0, ""), (0, "")]


def delete_file(path: Path) -> None:
    path.unlink()


def fill(disk: Path) -> None:
    """Leave no byte free."""
    with (disk / "filler").open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


def test_metrics_for_which_there_is_no_room_end_the_run_saved(corpus: str, tmp_path: Path) -> None:
    """The checkpoints are on another disk, so what is done can be saved; the full disk is what is told."""
    with small_disk(tmp_path / "disk", 2000) as disk:
        run_dir = disk / "run"
        run_dir.mkdir()
        (tmp_path / "checkpoints").mkdir()
        (run_dir / "checkpoints").symlink_to(tmp_path / "checkpoints")
        config = runs.config(corpus, training=ENDLESS, checkpoint={"save_interval_steps": 0, "save_optimizer": False})
        (code, message), (_, other) = run_ranks(2, pretrain_while_open, config, run_dir, 2, fill, disk)
        assert code is None
        assert f"[Errno 28] No space left on device: '{run_dir / 'metrics.jsonl'}'" in message
        assert "rank 0 failed in reporting step" in other
        saved = read_manifest(tmp_path / "checkpoints" / "latest")
        assert saved.counters.step >= runs.steps(run_dir)[-1]["step"] >= 2
        assert saved.has_optimizer


def pretrain_while_open(run: RunConfig, run_dir: Path, step: int, event: Callable[..., None], *arguments: Any) -> Any:
    """As `pretrain_while`, for errors that are no user's mistake: the command line tells them."""
    try:
        return pretrain_while(run, run_dir, step, event, *arguments)
    except OSError as error:
        return None, str(error)


def test_a_checkpoint_for_which_there_is_no_room_is_named_and_leaves_nothing(corpus: str, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1500) as disk:
        run_dir = disk / "run"
        config = runs.config(corpus, training={**ENDLESS, "train_steps": 60}, checkpoint={"keep_last": 0})
        for code, message in run_ranks(2, runs.pretrain, config, run_dir):
            assert code is None
            assert str(run_dir / "checkpoints") in message
            assert "MB" in message
        steps = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
        assert len(steps) > 1
        assert not [name for name in steps if name.startswith(".")]
        step = read_manifest(run_dir / "checkpoints" / "latest").counters.step
        assert runs.status(run_dir) == {"state": "failed", "exit_code": 1, "step": step + 3}
        # With room the same command continues.
        shutil.move(run_dir, tmp_path / "run")
    assert run_ranks(2, runs.pretrain, config, tmp_path / "run") == [(0, ""), (0, "")]


@pytest.mark.parametrize("part", ["run", "checkpoints"])
def test_a_disk_that_may_only_be_read_is_refused_before_anything_is_built(
    part: str, corpus: str, run_dir: Path, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", 4000) as disk:
        if part == "run":
            run_dir = Path(shutil.move(run_dir, disk / "run"))
        else:
            shutil.move(run_dir / "checkpoints", disk / "checkpoints")
            (run_dir / "checkpoints").symlink_to(disk / "checkpoints")
        remount(disk, "ro")
        for code, message in run_ranks(2, runs.pretrain, runs.config(corpus), run_dir):
            assert code is None
            assert f"{run_dir if part == 'run' else run_dir / 'checkpoints'} cannot be written to" in message


UNSTABLE = {"lr": 1e36, "min_lr": 1e36, "lr_warmup_steps": 0, "clip_grad": 0.0}
"""After an update or two, no gradient is finite; the weights still are."""
UNGUARDED = {**ENDLESS, "max_consecutive_nonfinite_steps": 1_000_000}


def test_stopping_within_skipped_steps_saves_what_was_applied(corpus: str, run_dir: Path) -> None:
    """The good checkpoint stays, and a life that brings nothing new is a failure rather than saved."""
    config = runs.config(corpus, training=UNGUARDED, optimizer=UNSTABLE, checkpoint={"keep_last": 1})
    before = runs.steps(run_dir)[-1]["step"]
    outcomes = run_ranks(2, runs.pretrain_with_signal, config, run_dir, 1, signal.SIGTERM, before + 8)
    assert outcomes == [(75, ""), (75, "")]
    last = runs.steps(run_dir)[-1]
    assert last["skipped"]
    saved = read_manifest(run_dir / "checkpoints" / "latest").counters
    assert runs.status(run_dir) == {"state": "saved", "exit_code": 75, "step": saved.step}
    assert saved.step == last["step"]
    assert before < saved.optimizer_steps < saved.step
    assert (run_dir / "checkpoints" / "step_00000006" / "checkpoint.json").exists()
    assert "older checkpoints were kept" in (run_dir / "train.log").read_text()

    hurried = runs.config(corpus, training={**UNGUARDED, "exit_after_seconds": 0.0}, optimizer=UNSTABLE)
    for code, message in run_ranks(2, runs.pretrain, hurried, run_dir):
        assert code is None
        assert f"every step of this start, {saved.step + 1} to {saved.step + 1}, was skipped" in message
        assert f"the run continues from the checkpoint of step {saved.step}: start it again with a lower" in message
    assert runs.status(run_dir)["state"] == "failed"
    assert read_manifest(run_dir / "checkpoints" / "latest").counters == saved


def test_a_run_that_ends_with_a_skipped_step_is_saved_and_says_so(corpus: str, run_dir: Path) -> None:
    config = runs.config(
        corpus, training={"train_steps": 12, "max_consecutive_nonfinite_steps": 50}, optimizer=UNSTABLE
    )
    for code, message in run_ranks(2, runs.pretrain, config, run_dir):
        assert code is None
        assert "the last step, 12, was skipped" in message
        assert "all older checkpoints were kept" in message
    assert read_manifest(run_dir / "checkpoints" / "latest").counters.step == 12
    assert (run_dir / "checkpoints" / "step_00000006").exists()
