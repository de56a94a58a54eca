"""Hugging Face folders on disk: lazy reading, refusals, division into files, and publishing by rename."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_7b.config.schema import ModelConfig
from megatron_7b.conversion import HuggingFaceFolder, to_hugging_face_config
from megatron_7b.conversion import folder_writer as writer
from megatron_7b.conversion.json_files import write_json
from megatron_7b.conversion.staging import staged_folder
from megatron_7b.errors import ConversionError, PathError
from tests.conversion.test_weights import MODEL, random_weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of two weight files and an index."""
    path = tmp_path / "model"
    path.mkdir()
    write_json(path / "config.json", {"model_type": "llama"})
    weights = random_weights(MODEL)
    writer.write_weights(path, weights.items(), model=MODEL, vocab_size=10, dtype=torch.float32, max_shard_bytes=4000)
    return path


def test_reading(folder: Path):
    opened = HuggingFaceFolder(folder)
    assert opened.config == {"model_type": "llama"}
    assert opened.shapes["model.norm.weight"] == (8,)
    assert opened.dtypes["model.norm.weight"] == "F32"
    assert opened["model.norm.weight"].shape == (8,)
    assert len(opened) == len(list(opened)) == 21
    assert "lm_head.weight" in opened
    assert "nothing" not in opened


def test_files_are_as_full_as_fits(folder: Path):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    sizes = writer.weight_sizes(MODEL, 10, torch.float32)
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert index["weight_map"].keys() == sizes.keys()
    files = sorted(set(index["weight_map"].values()))
    assert files == sorted(file.name for file in folder.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        assert sum(sizes[name] for name, where in index["weight_map"].items() if where == file) <= 4000


@pytest.mark.parametrize(
    ("limit", "expected"), [(1, [["a"], ["b"], ["c"]]), (5, [["a", "b"], ["c"]]), (6, [["a", "b"], ["c"]])]
)
def test_assignment_to_files(limit: int, expected: list[list[str]]):
    assert writer.assign_shards({"a": 2, "b": 3, "c": 4}, limit) == expected


def test_weights_are_rounded_to_the_dtype_asked_for(tmp_path: Path):
    weights = random_weights(MODEL)
    total = writer.write_weights(tmp_path, weights.items(), model=MODEL, vocab_size=10, dtype=torch.bfloat16)
    write_json(tmp_path / "config.json", {})
    opened = HuggingFaceFolder(tmp_path)
    assert total == 2 * sum(tensor.numel() for tensor in weights.values())
    assert all(torch.equal(opened[name], weights[name].bfloat16()) for name in weights)


def test_a_stream_out_of_order_is_our_own_mistake(tmp_path: Path):
    weights = dict(reversed(random_weights(MODEL).items()))
    with pytest.raises(AssertionError):
        writer.write_weights(tmp_path, weights.items(), model=MODEL, vocab_size=10, dtype=torch.float32)


def test_a_full_disk_is_noticed_before_writing(tmp_path: Path):
    huge = ModelConfig(num_layers=200, hidden_size=2**15, ffn_hidden_size=2**17)
    with pytest.raises(ConversionError, match="GiB free"):
        writer.write_weights(tmp_path, iter(()), model=huge, vocab_size=10, dtype=torch.float32)
    assert not list(tmp_path.iterdir())


def cut(path: Path) -> None:
    file = next(path.glob("model-00002*"))
    os.truncate(file, file.stat().st_size - 5)


def never_fetched(path: Path) -> None:
    (path / "model-00002-of-00002.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def lose_a_file(path: Path) -> None:
    next(path.glob("model-00002*")).unlink()


def swap_files(path: Path) -> None:
    first, second = sorted(path.glob("*.safetensors"))[:2]
    first.rename(path / "x")
    second.rename(first)
    (path / "x").rename(second)


def pickle_only(path: Path) -> None:
    for file in path.glob("model*"):
        file.unlink()
    torch.save({}, path / "pytorch_model.bin")


def quantise(path: Path) -> None:
    for file in path.glob("model*"):
        file.unlink()
    save_file({"model.norm.weight": torch.zeros(3, dtype=torch.int8)}, path / "model.safetensors")


def point_outside(path: Path) -> None:
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../secret.safetensors"}}')


def leave_an_old_file(path: Path) -> None:
    save_file({"model.norm.weight": torch.zeros(3)}, path / "model.safetensors")


def repeat_a_tensor(path: Path) -> None:
    first, second = sorted(path.glob("*.safetensors"))
    save_file({**load_file(first), "model.norm.weight": load_file(second)["model.norm.weight"]}, first)


def promise_a_tensor(path: Path) -> None:
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.bias"] = "model-00001-of-00002.safetensors"
    write_json(index, content)


def cache_entry(path: Path) -> None:
    (path / "snapshots").mkdir()
    (path / "snapshots" / "1f3a").mkdir()
    (path / "config.json").rename(path / "snapshots" / "1f3a" / "config.json")


def adapter_beside(path: Path) -> None:
    write_json(path / "adapter_config.json", {})


def remove_weights(path: Path) -> None:
    for file in path.glob("model*"):
        file.unlink()


def adapter(path: Path) -> None:
    (path / "config.json").rename(path / "adapter_config.json")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (never_fetched, "model-00002.* is a pointer of Git LFS.*\n.*git lfs pull"),
        (cut, "model-00002.*cannot be read.*\n.*not copied completely"),
        (lose_a_file, "lacks 1 of the 2 files that .*index.json names, such as model-00002-of-00002.safetensors"),
        (
            leave_an_old_file,
            r"two sets of weights: model.safetensors, .* and the 2 files of model.safetensors.index.json",
        ),
        (repeat_a_tensor, "model-00001.* holds model.norm.weight, which the index does not place there"),
        (promise_a_tensor, "model-00001.* lacks lm_head.bias, which the index places there"),
        (cache_entry, r"hint: give .*snapshots/1f3a$"),
        (adapter_beside, "holds an adapter beside a model"),
        (swap_files, "does not hold what model.safetensors.index.json says"),
        (pickle_only, "pytorch_model.bin.*can run code"),
        (quantise, "model.norm.weight is I8"),
        (point_outside, "points outside its folder"),
        (adapter, "holds an adapter"),
        (lambda path: (path / "config.json").write_text("[1]"), "holds a list, expected a JSON object"),
        (lambda path: (path / "config.json").write_text("{"), "not readable as JSON"),
        (lambda path: (path / "config.json").unlink(), "config.json is missing"),
        (
            lambda path: (path / "model.safetensors.index.json").unlink(),
            "has 2 weight files .* but no model.safetensors",
        ),
        (remove_weights, "holds neither model.safetensors nor"),
        (lambda path: (path / "model.safetensors.index.json").write_text("{}"), "has no weight_map"),
    ],
    ids=lambda value: getattr(value, "__name__", value if isinstance(value, str) else None),
)
def test_damaged_and_foreign_folders_are_refused(damage, message: str, folder: Path):
    damage(folder)
    with pytest.raises((ConversionError, PathError), match=message):
        HuggingFaceFolder(folder)


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path):
    with pytest.raises(PathError, match="is not a folder"):
        HuggingFaceFolder(tmp_path / "nothing")


STAGING = ".out.megatron_7b-convert.tmp"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_only_when_complete(tmp_path: Path):
    output = tmp_path / "deep" / "out"
    with staged_folder(output) as staging:
        (staging / "a").write_text("new")
        assert staging.name == STAGING
        assert not output.exists()
    assert (output / "a").read_text() == "new"
    assert names(output.parent) == ["out"]


def test_after_a_failure_everything_is_as_before(tmp_path: Path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "a").write_text("old")
    (tmp_path / STAGING).mkdir()
    (tmp_path / STAGING / "left over").touch()
    (tmp_path / "out.tmp").mkdir()  # somebody's own

    def interrupted() -> None:
        with staged_folder(output) as staging:
            assert not names(staging)
            (staging / "a").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (output / "a").read_text() == "old"
    assert names(tmp_path) == ["out", "out.tmp"]


def test_an_existing_folder_is_replaced_as_a_whole(tmp_path: Path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").touch()
    with staged_folder(output) as staging:
        (staging / "new").touch()
    assert names(output) == ["new"]
    assert names(tmp_path) == ["out"]


def test_an_index_of_one_file_under_the_usual_name_is_no_contradiction(tmp_path: Path):
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {"a": "model.safetensors"}})
    torch.save({}, tmp_path / "pytorch_model.bin")  # which transformers passes over too
    assert HuggingFaceFolder(tmp_path).shapes == {"a": (3,)}


def test_transformers_reads_the_single_file_where_both_are(folder: Path):
    """What the refusal of two sets of weights says about transformers."""
    from transformers import AutoModelForCausalLM

    write_json(folder / "config.json", to_hugging_face_config(MODEL, vocab_size=10, dtype="float32"))
    weights = {name: torch.zeros(shape) for name, shape in HuggingFaceFolder(folder).shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(not tensor.any() for tensor in loaded.values())
