"""`megatron-7b convert`: folders to checkpoints and back, checkpoints of every layout, and what is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_7b.checkpoint import read_config, read_manifest, tokenizer_path
from megatron_7b.checkpoint.weights import CheckpointWeights
from megatron_7b.cli.main import main
from megatron_7b.conversion import HuggingFaceFolder, mappings
from megatron_7b.conversion.hf_tokenizer import PROBE_TEXTS
from megatron_7b.conversion.parity import hugging_face_logits, random_tokens
from megatron_7b.tokenizer import load_tokenizer
from tests.conversion.tiny_models import save_tiny_model, save_tiny_tokenizer
from tests.support.assets import REPOSITORY
from tests.support.checkpoint_runs import train_save
from tests.support.ranks import run_ranks
from tests.support.reference_gpt import reference_logits
from tests.support.tiny_runs import VOCAB_SIZE, tiny_config

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def convert(*arguments: object) -> int:
    return main(["convert", *map(str, arguments)])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    save_tiny_tokenizer(folder)
    save_tiny_model("llama_tied", folder, vocab_size=300)
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 1], "temperature": 0.5}')
    return folder


@pytest.fixture(scope="module")
def checkpoint(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a checkpoint."""
    output = tmp_path_factory.mktemp("converted") / "checkpoint"
    assert convert("from-hf", "--input", llama, "--output", output) == 0
    return output


@pytest.mark.parametrize("case", ["llama3_scaled", "mistral", "qwen2", "qwen3"])
def test_every_family_there_and_back(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_tiny_model(case, tmp_path / "in")
    assert convert("from-hf", "--input", tmp_path / "in", "--output", tmp_path / "c") == 0
    assert convert("to-hf", "--checkpoint", tmp_path / "c", "--output", tmp_path / "out") == 0
    source, result = HuggingFaceFolder(tmp_path / "in"), HuggingFaceFolder(tmp_path / "out")
    assert set(source) == set(result)
    assert all(torch.equal(source[name], result[name]) for name in source)
    printed = capsys.readouterr().out
    assert printed.count("parity") == 2
    assert "tolerated: 1." in printed or "tolerated: 2." in printed


def test_a_checkpoint_carries_everything(llama: Path, checkpoint: Path):
    assert read_manifest(checkpoint).vocab_size == 300
    config = read_config(checkpoint)
    assert config.model.vocab_size == 300
    assert config.model.num_query_groups == 2
    assert config.precision.params_dtype == "fp32"
    carried = tokenizer_path(checkpoint)
    assert carried is not None
    assert load_tokenizer(carried).identity == load_tokenizer(llama).identity
    assert not list(checkpoint.parent.glob("*.tmp"))


def test_the_tokenizer_and_its_settings_come_back_as_they_were(llama: Path, checkpoint: Path, tmp_path: Path):
    from transformers import AutoTokenizer, GenerationConfig

    output = tmp_path / "out"
    assert convert("to-hf", "--checkpoint", checkpoint, "--output", output, "--max-shard-gib", 1e-4) == 0
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (output / name).read_bytes() == (llama / name).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(output)
    text = "the cat's 1234 naps"
    assert tokenizer.encode(text) == load_tokenizer(llama).encode(text)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert GenerationConfig.from_pretrained(output).eos_token_id == [0, 1]
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (llama, output))
    assert {name: after[name] for name in TOKEN_IDS} == {name: before[name] for name in TOKEN_IDS}
    assert len(list(output.glob("*.safetensors"))) > 1
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in output.glob("*.safetensors"))


@pytest.mark.parametrize("params_dtype", ["fp32", "bf16"])
def test_export_of_a_parallel_run(params_dtype: str, tmp_path: Path):
    """TP2×PP2 with padded vocabulary, trained for two steps: what is exported is what was trained."""
    parallel = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    config = tiny_config(parallel=parallel, precision={"params_dtype": params_dtype})
    (tmp_path / "run").mkdir()
    run_ranks(4, train_save, config, tmp_path / "run" / "checkpoints", 2)
    latest = tmp_path / "run" / "checkpoints" / "latest"
    assert convert("to-hf", "--checkpoint", latest, "--output", tmp_path / "out") == 0
    folder = HuggingFaceFolder(tmp_path / "out")
    assert set(folder.dtypes.values()) == {"F32" if params_dtype == "fp32" else "BF16"}
    assert folder.shapes["model.embed_tokens.weight"] == folder.shapes["lm_head.weight"] == (VOCAB_SIZE, 64)
    tokens = random_tokens(VOCAB_SIZE, length=32)
    weights = {name: tensor.float() for name, tensor in CheckpointWeights(latest.resolve()).items()}
    expected = reference_logits(weights, config.model, tokens)
    assert torch.allclose(hugging_face_logits(tmp_path / "out", tokens), expected, atol=1e-4)


def test_export_in_another_number_format(checkpoint: Path, tmp_path: Path):
    assert convert("to-hf", "--checkpoint", checkpoint, "--output", tmp_path / "out", "--dtype", "bf16") == 0
    folder = HuggingFaceFolder(tmp_path / "out")
    assert set(folder.dtypes.values()) == {"BF16"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert convert("from-hf", "--input", tmp_path / "out", "--output", tmp_path / "c") == 0
    assert read_manifest(tmp_path / "c").params_dtype == "bfloat16"
    assert convert("from-hf", "--input", tmp_path / "out", "--output", tmp_path / "f", "--dtype", "fp32") == 0
    assert read_manifest(tmp_path / "f").params_dtype == "float32"


def test_rounding_on_the_way_in_is_no_difference(llama: Path, tmp_path: Path):
    arguments = ("from-hf", "--input", llama, "--output", tmp_path / "c", "--dtype", "bf16")
    assert convert(*arguments, "--parity-dtype", "bf16") == 0
    assert convert(*arguments, "--overwrite") == 0
    assert read_manifest(tmp_path / "c").params_dtype == "bfloat16"


def swap_first_heads(tensor: torch.Tensor) -> torch.Tensor:
    """The fault of a converter that takes the wrong order of heads: the first two, of width 8, change places."""
    return torch.cat([tensor[8:16], tensor[:8], tensor[16:]])


def test_a_wrong_mapping_is_never_published(
    checkpoint: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    right_split = mappings.QueryKeyValue.to_hugging_face
    right_join = mappings.QueryKeyValue.from_hugging_face
    monkeypatch.setattr(
        mappings.QueryKeyValue, "to_hugging_face", lambda *args: tuple(map(swap_first_heads, right_split(*args)))
    )
    monkeypatch.setattr(mappings.QueryKeyValue, "from_hugging_face", lambda *args: swap_first_heads(right_join(*args)))
    output = tmp_path / "out"
    output.mkdir()
    # Splitting moves keys and values as well, joining only two query heads, which a single position cannot show.
    suspects = {"to-hf": "from the first position on", "from-hf": "only from position 1 on: suspect queries"}
    for arguments in (("to-hf", "--checkpoint", checkpoint), ("from-hf", "--input", llama)):
        assert convert(*arguments, "--output", output) == 1
        message = capsys.readouterr().err
        assert "the two models compute different logits" in message
        assert f"hint: it differs {suspects[arguments[0]]}" in message
        assert not list(output.iterdir())
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_tokenizer_that_transformers_rebuilds_keeps_its_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from transformers import AutoTokenizer

    save_tiny_tokenizer(tmp_path / "in")
    save_tiny_model("qwen2", tmp_path / "in", vocab_size=260)
    assert convert("from-hf", "--input", tmp_path / "in", "--output", tmp_path / "c") == 0
    captured = capsys.readouterr()
    assert "the ids are those of transformers' Qwen2Tokenizer" in captured.out
    assert "the model embeddings for 260 tokens" in captured.err
    carried = tokenizer_path(tmp_path / "c")
    assert carried is not None
    assert load_tokenizer(carried).identity == load_tokenizer(tmp_path / "in").identity
    assert convert("to-hf", "--checkpoint", tmp_path / "c", "--output", tmp_path / "out") == 0
    assert "warning" not in capsys.readouterr().err
    text = PROBE_TEXTS[1]
    ours = load_tokenizer(tmp_path / "in").encode(text)
    assert AutoTokenizer.from_pretrained(tmp_path / "in").encode(text) == ours
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode(text) == ours


def test_a_tokenizer_that_merges_at_random_is_not_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """As left behind by training with BPE dropout: no two encodings are the same."""
    save_tiny_tokenizer(tmp_path / "in")
    save_tiny_model("llama", tmp_path / "in", vocab_size=300)
    definition = json.loads((tmp_path / "in" / "tokenizer.json").read_text())
    definition["model"]["dropout"] = 0.5
    (tmp_path / "in" / "tokenizer.json").write_text(json.dumps(definition))
    assert convert("from-hf", "--input", tmp_path / "in", "--output", tmp_path / "c") == 1
    assert "splits words at random (model.dropout is 0.5)" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_a_tokenizer_whose_ids_nothing_keeps_is_not_published(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """No tokenizer is known whose ids an export changes, so the answer of that comparison is given by hand."""
    save_tiny_tokenizer(tmp_path / "in")
    save_tiny_model("llama", tmp_path / "in", vocab_size=300)
    assert convert("from-hf", "--input", tmp_path / "in", "--output", tmp_path / "c") == 0
    capsys.readouterr()
    monkeypatch.setattr("megatron_7b.conversion.exporting.give_back_tokenizer", lambda *_, **__: False)
    arguments = ("to-hf", "--checkpoint", tmp_path / "c", "--output", tmp_path / "out")
    assert convert(*arguments) == 1
    message = capsys.readouterr().err
    assert "AutoTokenizer gives text other ids than the tokenizer of the checkpoint" in message
    assert "hint: --allow-other-token-ids publishes it all the same" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "in"]
    assert convert(*arguments, "--allow-other-token-ids") == 0
    assert "warning: transformers' AutoTokenizer gives text other ids" in capsys.readouterr().err
    assert (tmp_path / "out" / "config.json").is_file()


def test_without_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_tiny_model("llama", tmp_path / "in")
    assert convert("from-hf", "--input", tmp_path / "in", "--output", tmp_path / "c") == 0
    assert "has no tokenizer" in capsys.readouterr().err
    assert tokenizer_path(tmp_path / "c") is None


REFUSED: list[tuple[list[Any], str]] = [
    ([], "usage: megatron-7b convert"),
    (["to-hg"], "did you mean to-hf?"),
    (["to-hf", "--output", "{tmp}/out"], "--checkpoint"),
    (["to-hf", "--checkpoint", "{tmp}/nothing", "--output", "{tmp}/out"], "does not exist"),
    (["to-hf", "--checkpoint", "{checkpoint}", "--output", "{llama}"], "is not empty"),
    (["to-hf", "--checkpoint", "{checkpoint}", "--output", "{checkpoint}", "--overwrite"], "would replace"),
    (["to-hf", "--checkpoint", "{checkpoint}", "--output", "{tmp}/out", "--dtype", "fp8"], "invalid choice"),
    (["from-hf", "--input", "{tmp}/nothing", "--output", "{tmp}/out"], "is not a folder"),
    (["from-hf", "--input", "{checkpoint}", "--output", "{tmp}/out"], "config.json is missing"),
    (["from-hf", "--input", "{llama}", "--output", "{checkpoint}"], "is not empty"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_mistakes_are_told_before_anything_is_written(
    arguments: list[str],
    message: str,
    llama: Path,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    folders = {"tmp": tmp_path, "llama": llama, "checkpoint": checkpoint}
    assert convert(*(argument.format(**folders) for argument in arguments)) != 0
    captured = capsys.readouterr()
    assert message in captured.err + captured.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["from-hf", "--input", "{tmp}/nothing", "--output", "{tmp}/out"],
        ["from-hf", "--input", "{checkpoint}", "--output", "{tmp}/out"],
        ["from-hf", "--input", "{llama}", "--output", "{checkpoint}"],
        ["from-hf", "--input", "{broken}", "--output", "{tmp}/out"],
        ["to-hf", "--checkpoint", "{tmp}/nothing", "--output", "{tmp}/out"],
        ["to-hf", "--checkpoint", "{checkpoint}", "--output", "{llama}"],
    ],
)
def test_mistakes_are_told_before_torch_is_imported(
    arguments: list[str], llama: Path, checkpoint: Path, tmp_path: Path
):
    """What takes seconds to import is not imported to say what a glance at the folder shows."""
    broken = tmp_path / "broken"
    shutil.copytree(llama, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "intermediate_size": 81}))
    folders = {"tmp": tmp_path, "llama": llama, "checkpoint": checkpoint, "broken": broken}
    words = ["convert", *(argument.format(**folders) for argument in arguments)]
    script = f"import sys; from megatron_7b.cli.main import main; print(main({words!r}), *sorted(sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    code, *modules = result.stdout.split()
    assert code != "0"
    assert result.stderr.startswith("error: ")
    assert not {"torch", "transformers", "megatron"} & set(modules)


def test_a_damaged_checkpoint_is_refused(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(checkpoint, tmp_path / "c")
    with next((tmp_path / "c").glob("*.distcp")).open("rb+") as file:
        file.seek(20_000)
        file.write(b"\xff\x00\xff")
    assert convert("to-hf", "--checkpoint", tmp_path / "c", "--output", tmp_path / "out") == 1
    assert "was changed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_tool_is_the_command():
    script = REPOSITORY / "tools" / "convert_checkpoint.py"
    result = subprocess.run([sys.executable, script, "to-hf", "--help"], capture_output=True, text=True, check=True)
    assert "--output" in result.stdout
