"""`megatron-7b convert grow` as one types it: what it prints and refuses, and that its next command works."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_7b.checkpoint import read_config, read_manifest
from megatron_7b.cli.main import main
from megatron_7b.config import save_config
from tests.conversion.growing_models import write_random
from tests.conversion.test_growing import LLAMA
from tests.conversion.tiny_models import save_tiny_model, save_tiny_tokenizer
from tests.support.commands import run_command
from tests.training import runs


def grow(*arguments: object) -> int:
    return main(["convert", "grow", *map(str, arguments)])


def printed_command(output: str) -> list[str]:
    program, *words = shlex.split(output.partition("next:\n")[2])
    assert program == "megatron-7b"
    return words


def losses(run_dir: Path) -> list[float]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_a_run_is_grown_and_trained_further(tmp_path: Path) -> None:
    """Trained at TP2 and PP2, grown in all directions, and trained by the very command that was printed."""
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    run = runs.config(
        runs.write_corpus(tmp_path), parallel=layout, training={"train_steps": 3, "eval_interval_steps": 0}
    )
    save_config(run, tmp_path / "run.yaml")
    done = run_command("pretrain", "--config", tmp_path / "run.yaml", "--run-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    checkpoint, large = tmp_path / "run" / "checkpoints" / "latest", tmp_path / "large model"
    sizes = ("--num-layers", 3, "--hidden-size", 64, "--ffn-hidden-size", 100)
    done = run_command("convert", "grow", "--checkpoint", checkpoint, "--output", large, *sizes)
    assert done.returncode == 0, done.stderr
    assert (
        "num_layers 2 to 3, hidden_size 32 to 64, ffn_hidden_size 64 to 100, num_attention_heads 2 to 4" in done.stdout
    )
    assert "tolerated: 1.0e-05 in FP32" in done.stdout
    assert "no optimizer state" in done.stdout
    config, manifest = read_config(large), read_manifest(large)
    assert config.parallel == run.parallel  # three layers on two stages: one has two
    assert "does not fit" not in done.stderr
    assert (config.data, config.optimizer) == (run.data, run.optimizer)
    assert (manifest.counters.step, manifest.has_optimizer) == (0, False)
    command = printed_command(done.stdout)
    done = run_command(*command)
    assert done.returncode == 0, done.stderr
    further = losses(Path(command[command.index("--run-dir") + 1]))
    assert further[0] < losses(tmp_path / "run")[0] - 0.05, "it starts where the small model has got to"
    # The same preset as before; the shape comes from the checkpoint.
    words = (
        "--checkpoint.initialize-from",
        large,
        "--run-dir",
        tmp_path / "again",
        "--data.train",
        config.data.train[0],
    )
    layout_words = ("--nproc", 2, "--parallel.tensor-model-parallel-size", 2, "--training.train-steps", 1)
    done = run_command(
        "pretrain",
        "--config",
        tmp_path / "run.yaml",
        *words,
        *layout_words,
        "--parallel.pipeline-model-parallel-size",
        1,
    )
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "again")[0] == pytest.approx(further[0], abs=1e-4)


def test_stacking_says_how_the_loss_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs.config(runs.write_corpus(tmp_path))
    source = write_random(tmp_path / "c", run.model, run=run)
    assert grow("--checkpoint", source, "--output", tmp_path / "d", "--num-layers", 4, "--method", "stack") == 0
    output = capsys.readouterr().out
    assert "changed  stacked layers compute something else" in output
    assert f"after, over the first tokens of {run.data.train[0]}" in output


def test_from_a_hugging_face_folder_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What names every layer or the inner width in config.json fits the larger model."""
    save_tiny_tokenizer(tmp_path / "in")
    for case, sizes in (
        ("qwen2_tied", ("--num-layers", 5, "--hidden-size", 96)),
        ("gpt2", ("--num-layers", 3, "--hidden-size", 64, "--ffn-hidden-size", 100)),
        ("bert", ("--hidden-size", 96)),
    ):
        save_tiny_model(case, tmp_path / "in", vocab_size=300)
        capsys.readouterr()
        assert grow("--checkpoint", tmp_path / "in", "--output", tmp_path / "d", "--overwrite", *sizes) == 0
        output = capsys.readouterr().out
        assert output.count("parity") in (2, 3)  # with one in FP64 if FP32 shows more than 1e-5
        assert output.count("wrote") == 1
        assert "--data.train PREFIX_text_document" in output
        arguments = ("--checkpoint", tmp_path / "d", "--output", tmp_path / "out", "--overwrite")
        assert main(["convert", "to-hf", *map(str, arguments)]) == 0
        assert (tmp_path / "out" / "tokenizer.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "in", "out"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "{tmp}/nothing", "--output", "{tmp}/d", "--num-layers", "3"], "does not exist"),
        (["--checkpoint", "{checkpoint}", "--output", "{tmp}/d"], "nothing would grow"),
        (["--checkpoint", "{checkpoint}", "--output", "{tmp}/d", "--num-layers", "1"], "expected at least 2"),
        (["--checkpoint", "{checkpoint}", "--output", "{tmp}/d", "--num-layers", "eight"], "invalid int value"),
        (["--checkpoint", "{checkpoint}", "--output", "{checkpoint}", "--num-layers", "3"], "would replace"),
        (["--checkpoint", "{checkpoint}", "--output", "{full}", "--num-layers", "3"], "is not empty"),
        (
            ["--checkpoint", "{checkpoint}", "--output", "{full}", "--num-layers", "3", "--overwrite"],
            "which is no imported checkpoint",
        ),
    ],
)
def test_mistakes_are_told_before_torch_is_imported(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    checkpoint = write_random(tmp_path / "c", LLAMA)
    folders = {"tmp": tmp_path, "checkpoint": checkpoint, "full": tmp_path / "full"}
    words = ["convert", "grow", *(argument.format(**folders) for argument in arguments)]
    script = f"import sys; from megatron_7b.cli.main import main; print(main({words!r}), *sorted(sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    code, *modules = result.stdout.split()
    assert code != "0"
    assert message in result.stderr
    assert not {"torch", "transformers", "megatron"} & set(modules)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "full"]
