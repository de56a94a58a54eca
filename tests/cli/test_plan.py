"""`plan` and `--config auto` as commands: output, exit codes, what a run gets."""

import json
import re
import shlex
import subprocess
import sys

import pytest

from megatron_7b.cli.automatic import with_layout
from megatron_7b.cli.main import main
from megatron_7b.cli.options import parse_arguments
from megatron_7b.cli.training_run import training_parser
from megatron_7b.config import check_config, load_config
from megatron_7b.errors import ConfigError
from megatron_7b.planning import automatic
from megatron_7b.planning.automatic import choose_layout, gpus_of
from tests.support.assets import REPOSITORY

KINDS = {"parameters", "gradients", "optimizer", "activations", "logits", "nccl", "graphs", "context", "total"}


def planned(capsys: pytest.CaptureFixture[str], words: str, code: int = 0) -> str:
    assert main(["plan", *shlex.split(words)]) == code
    return capsys.readouterr().out


def test_json_is_as_promised(capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(planned(capsys, "--config llama2_7b --gpus 8 --gpu h100 --json"))
    assert told["fits"] is True
    assert set(told["memory_bytes"]) == KINDS
    assert told["tokens_per_second_per_gpu"] > 10_000
    assert told["layout"]["data_parallel_size"] == 8
    assert told["candidates"][0]["layout"] == told["layout"]
    assert told["configured"]["fits"] is False
    config = load_config("llama2_7b", told["options"])  # they are options of a run
    check_config(config, world_size=8)


def test_the_table_ends_with_a_command_that_runs_the_first_choice(capsys: pytest.CaptureFixture[str]) -> None:
    told = planned(capsys, "--config llama2_7b --gpus 16 --gpu h100 --training.global-batch-size 512 --top 3")
    *_, command = told.splitlines()
    words = shlex.split(command)
    assert words[:4] == ["megatron-7b", "pretrain", "--config", "llama2_7b"]
    assert "--training.global-batch-size 512" in command
    assert "--nnodes 2 --nproc 8" in command
    overrides = parse_arguments(training_parser("pretrain", ""), [*words[2:], "--run-dir", "R"]).overrides
    check_config(load_config("llama2_7b", overrides), world_size=16)


def test_the_command_undoes_what_the_preset_has_and_names_what_it_changes(capsys: pytest.CaptureFixture[str]) -> None:
    told = planned(capsys, "--config llama2_7b sft_7b_8xh100 --gpus 8 --gpu h200 --top 1")
    *_, command = told.splitlines()
    words = shlex.split(command)
    assert words[:2] == ["megatron-7b", "finetune"]
    overrides = parse_arguments(training_parser("finetune", ""), [*words[2:], "--run-dir", "R"]).overrides
    assert overrides["parallel.tensor_model_parallel_size"] == "1"  # where the preset has 2
    told = planned(capsys, "--config llama2_7b --gpus 1 --gpu h100 --json")
    assert json.loads(told)["changed"] == {
        "precision.optimizer_state_dtype": "bf16", "precision.grad_reduce_in_fp32": False,
    }  # fmt: skip


def test_what_fits_nowhere_ends_with_1_and_says_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    told = planned(capsys, "--config mixtral_8x7b --gpus 8 --gpu a100-40", code=1)
    assert "No layout fits. These would:" in told
    assert "--gpus " in told


def test_a_processor_that_is_too_small_is_told_of_gpus_that_hold_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    told = planned(capsys, "--config llama2_7b --gpus 2 --gpu cpu --gpu-memory 4", code=1)
    assert "No layout fits. These would:\n  --gpu h100: NVIDIA H100 SXM → " in told


def test_large_figures_have_no_exponents(capsys: pytest.CaptureFixture[str]) -> None:
    told = planned(capsys, "--config llama2_7b --gpus 1 --gpu cpu --gpu-memory 9999 --top 1")
    assert "e+" not in told
    time_of_first = next(line for line in told.splitlines() if line.startswith("time of 1:"))
    assert re.search(r"matrix products [\d,]+\.\d, .*; [\d,]+\.\d s$", time_of_first)


def test_flags_of_the_devices_count(capsys: pytest.CaptureFixture[str]) -> None:
    small = json.loads(planned(capsys, "--config llama2_7b --gpu-memory 40 --json"))
    large = json.loads(planned(capsys, "--config llama2_7b --gpu-memory 200 --json"))
    assert small["memory_bytes"]["total"] < 40e9 < large["memory_bytes"]["total"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--gpus 0", "expected at least 1"),
        ("--link -1", "expected a number above 0"),
        ("--gpu-memory nan", "is nan, expected"),
        ("--scaling 8 0", "--scaling is 0"),
        ("--scaling 8 --page P", "leave one of them out"),
        ("--top 0", "--top is 0"),
        ("--modle.x 1", "unknown option"),
        ("--gpu h1000", "did you mean h100?"),
        (
            "--parallel.tensor-model-parallel-size 16",
            "no layout divides it with parallel.tensor_model_parallel_size = 16",
        ),
        ("--gpus 11 --parallel.pipeline-model-parallel-size 4", "hint: --gpus 8 or 12, or leave"),
        ("--gpus 7 --parallel.pipeline-model-parallel-size 1", "--training.global-batch-size 252 or 259"),
    ],
)
def test_wrong_flags(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", "llama2_7b", *words.split()]) == 2
    assert message in capsys.readouterr().err


def test_the_model_of_a_fine_tuning_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Without weights or a preset of a model, the plan would be of a model that nobody has asked for."""
    assert main(["plan", "--config", "lora_7b_1xh100", "--gpus", "1"]) == 2
    assert "hint: --checkpoint.initialize-from C" in capsys.readouterr().err
    assert main(["plan", "--config", "llama2_7b", "lora_7b_1xh100", "--gpus", "1"]) == 0
    assert "note: the model of a fine-tuning" in capsys.readouterr().err


def test_a_batch_that_grows_is_whole_on_every_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(planned(capsys, "--config llama2_7b --scaling 3 7 --json"))
    batches = [row["grown_batch"]["layout"] for row in rows]
    assert [one["micro_batch_size"] * one["num_microbatches"] * one["data_parallel_size"] for one in batches] == [
        256,
        602,
    ]


def test_page_and_scaling(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "plan.html"
    planned(capsys, f"--config llama3_8b --gpus 8 --page {page}")
    text = page.read_text()
    assert "<h2>Time of a step</h2>" in text
    assert "src=" not in text
    assert "http" not in text  # nothing is fetched
    rows = json.loads(planned(capsys, "--config llama2_7b --scaling 8 64 --json"))
    assert [row["gpus"] for row in rows] == [8, 64]
    assert rows[1]["same_batch"]["step_seconds"]["total"] < rows[0]["same_batch"]["step_seconds"]["total"]
    assert rows[1]["grown_batch"]["mfu"] >= rows[1]["same_batch"]["mfu"]


def test_planning_needs_no_torch_and_is_quick() -> None:
    program = (
        "import sys, time\nfrom megatron_7b.cli.main import main\nstart = time.process_time()\n"
        "assert main(['plan', '--config', 'llama2_7b', '--gpus', '64', '--json']) == 0\n"
        "assert not {'torch', 'megatron', 'matplotlib'} & set(sys.modules)\n"
        "assert time.process_time() - start < 5"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    assert result.returncode == 0, result.stderr


def test_auto_becomes_options_that_ranks_get_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(automatic, "may_have_gpu", lambda: False)
    monkeypatch.setattr(automatic, "available_cores", lambda: 2)
    argv = shlex.split(
        "--config tiny_cpu auto --run-dir R --model.vocab-size 512 --parallel.tensor-model-parallel-size 2"
    )
    command_line, words = with_layout(parse_arguments(training_parser("pretrain", ""), argv), argv)
    assert "auto" not in words
    assert command_line.flags.nproc == 2
    assert words[words.index("--nproc") + 1] == "2"
    again = parse_arguments(training_parser("pretrain", ""), words)
    assert again.overrides == command_line.overrides
    assert again.overrides["parallel.tensor_model_parallel_size"] == "2"
    check_config(load_config(again.flags.config, again.overrides), world_size=2)


def test_auto_takes_what_fits_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(automatic, "may_have_gpu", lambda: False)
    monkeypatch.setattr(automatic, "available_cores", lambda: 4)
    config = load_config("mini_cpu")
    for memory in (64 << 30, 3 << 30):
        monkeypatch.setattr(automatic, "available_memory", lambda memory=memory: memory)
        choice = choose_layout(config)
        assert 1 <= choice.world_size <= 4
        check_config(load_config("mini_cpu", choice.settings), world_size=choice.world_size)
    monkeypatch.setattr(automatic, "available_memory", lambda: 1 << 30)
    with pytest.raises(ConfigError, match="fits at no layout of this machine: memory: "):
        choose_layout(config)


def test_auto_takes_all_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(automatic, "may_have_gpu", lambda: True)
    listing = "NVIDIA H100 80GB HBM3, 81559\n" * 4
    monkeypatch.setattr(automatic, "find_gpus", lambda: gpus_of(listing))
    choice = choose_layout(load_config("llama2_7b"))
    assert choice.world_size == 4
    assert choice.settings["parallel.use_distributed_optimizer"] is True
    assert [device.node_size for device in gpus_of(listing)] == [4] * 4
    assert gpus_of("NVIDIA A100-SXM4-80GB, 81920")[0].name == "a100-80"
    assert gpus_of("NVIDIA A10, 23028")[0].flops["bf16"] == 125e12
    with pytest.raises(ConfigError, match="the rates of NVIDIA Unheard 1 are not known"):
        gpus_of("NVIDIA Unheard 1, 8192")


def test_auto_elsewhere_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "auto"]) == 2
    assert "which only `megatron-7b pretrain` and `finetune` do" in capsys.readouterr().err


HUGGING_FACE = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": False,
    "hidden_act": "silu", "use_sliding_window": False,
}  # fmt: skip


def test_the_model_may_be_that_of_weights(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HUGGING_FACE))
    of_preset = json.loads(planned(capsys, "--config qwen2_5_7b --gpus 8 --json"))
    for start in (tmp_path, tmp_path / "config.json"):
        words = f"--config llama2_7b --checkpoint.initialize-from {start} --gpus 8 --json"
        assert json.loads(planned(capsys, words))["memory_bytes"] == of_preset["memory_bytes"]
    (tmp_path / "config.json").write_text("{")
    assert main(["plan", "--config", "llama2_7b", "--checkpoint.initialize-from", str(tmp_path)]) == 2
    assert "is no JSON" in capsys.readouterr().err


def test_a_teacher_takes_memory_and_time(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HUGGING_FACE))
    layout = "--config llama2_7b_8xh100_bf16 --gpus 8 --json"
    alone = json.loads(planned(capsys, layout))["configured"]
    taught = json.loads(planned(capsys, f"{layout} --distillation.teacher {tmp_path}"))["configured"]
    added = taught["memory_bytes"]["parameters"] - alone["memory_bytes"]["parameters"]
    assert added == 2 * 7_615_616_512
    ratio = taught["step_seconds"]["matrix_products"] / alone["step_seconds"]["matrix_products"]
    assert 1.3 < ratio < 1.5  # a third more, and the teacher is a little larger
