"""A disk that runs full during a save, wherever that happens: what is said, and what is left."""

import resource
from pathlib import Path

import pytest

from megatron_7b.checkpoint import latest_checkpoint, read_manifest, verify_files
from megatron_7b.errors import CheckpointError
from tests.support.checkpoint_runs import train_save
from tests.support.ranks import run_ranks
from tests.support.small_disk import small_disk
from tests.support.tiny_runs import tiny_config


def save_or_say(
    folder: Path, step: int, tokenizer: Path | None = None, limited_rank: int | None = None, max_file_bytes: int = 0
) -> str:
    """Entry point of a rank: save, and return "" or what was raised; one rank's files may be limited in size."""
    import torch.distributed as dist

    if dist.get_rank() == limited_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, resource.RLIM_INFINITY))
    try:
        train_save(tiny_config(), folder, step, tokenizer=tokenizer)
    except CheckpointError as error:
        return str(error)
    return ""


def check_untouched(checkpoints: Path, messages: list[str]) -> None:
    """The step before is whole, nothing is left of the failed one, and every rank says where and why it failed."""
    first = checkpoints / "step_00000001"
    assert latest_checkpoint(checkpoints) == first
    verify_files(first, read_manifest(first).files)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_00000001"]
    for message in messages:
        assert message.startswith(f"the checkpoint of step 2 could not be written to {checkpoints}: ")
        assert "it takes about 2.3 MB, and " in message
        assert "MB are free there" in message
        assert "Traceback" not in message


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("max_file_bytes", [100_000, 500_000])
def test_a_file_that_cannot_be_written_to_its_end_costs_nothing_else(
    rank: int, max_file_bytes: int, tmp_path: Path
) -> None:
    """Of the weights, or of the optimizer's state, which are larger; on either rank."""
    checkpoints = tmp_path / "checkpoints"
    assert run_ranks(2, save_or_say, checkpoints, 1) == ["", ""]
    messages = run_ranks(2, save_or_say, checkpoints, 2, None, rank, max_file_bytes)
    check_untouched(checkpoints, messages)
    assert run_ranks(2, save_or_say, checkpoints, 2) == ["", ""]


def test_a_tokenizer_for_which_there_is_no_room_leaves_the_disk_as_it_was(tmp_path: Path) -> None:
    """All tensors fit, so the check beforehand lets the save begin."""
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_bytes(bytes(5_000_000))
    with small_disk(tmp_path / "disk", 8000) as disk:
        checkpoints = disk / "checkpoints"
        assert run_ranks(2, save_or_say, checkpoints, 1) == ["", ""]
        messages = run_ranks(2, save_or_say, checkpoints, 2, tokenizer)
        check_untouched(checkpoints, messages)
        for message in messages:
            assert "tokenizer/tokenizer.json: [Errno 28] No space left on device" in message


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 4000) as disk:
        checkpoints = disk / "checkpoints"
        assert run_ranks(2, save_or_say, checkpoints, 1) == ["", ""]
        for message in run_ranks(2, save_or_say, checkpoints, 2):
            assert message.startswith(f"the checkpoint of step 2 takes about 2.3 MB, but {checkpoints} has ")
        assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_00000001"]


def test_a_folder_that_has_gone_is_not_brought_back(tmp_path: Path) -> None:
    for message in run_ranks(2, save_or_say, tmp_path / "gone" / "checkpoints", 1):
        assert "No such file or directory" in message
    assert not (tmp_path / "gone").exists()


def test_whole_weights_that_cannot_be_written_leave_nothing(tmp_path: Path) -> None:
    """As in an import: one process, in which torch's own errors are no ordinary exceptions."""
    (message,) = run_ranks(1, write_whole, tmp_path / "checkpoints")
    assert message.startswith(f"the checkpoint of step 0 could not be written to {tmp_path / 'checkpoints'}: ")
    assert list((tmp_path / "checkpoints").iterdir()) == []


def write_whole(checkpoints: Path) -> str:
    import torch

    from megatron_7b.checkpoint.weights import write_weights
    from megatron_7b.model.kinds import parameter_table

    config = tiny_config()
    assert config.model.vocab_size is not None
    rows = parameter_table(config.model, config.model.vocab_size)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    try:
        write_weights(checkpoints, ((name, torch.zeros(row.shape)) for name, row in rows.items()), config)
    except CheckpointError as error:
        return str(error)
    return ""
