"""Tasks that a run is measured on as it trains: the figures of `evaluate --tasks`, and training as without them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_7b.config import save_config
from tests.support.checkpoint_runs import saved_tensors
from tests.support.commands import run_command
from tests.support.tiny_runs import tiny_config

pytest.importorskip("lm_eval")

WORDS = ["the cat", "sat on", "the mat", "naïve", "12 o'clock", "a dog"]
FIGURES = ("eval/own/bits_per_byte", "eval/own/word_perplexity", "eval/choice/acc", "eval/written/exact_match")
TP_SP = ("--parallel.tensor-model-parallel-size", 2, "--parallel.sequence-parallel", True)
PP2 = ("--parallel.pipeline-model-parallel-size", 2)
CP2_SHARDED = (
    *("--parallel.context-parallel-size", 2, "--nproc", 4, "--parallel.use-distributed-optimizer", True),
    *("--parallel.overlap-grad-reduce", True, "--parallel.overlap-param-gather", True),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of bytes, the configuration of a run with dropout, and a task of each kind."""
    folder = tmp_path_factory.mktemp("tasks")
    texts = [" ".join(WORDS[(n + k) % 6] for k in range(40)) for n in range(30)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    done = run_command(
        "preprocess", "--input", folder / "text.jsonl", "--output-prefix", folder / "text", "--tokenizer-model",
        "bytes", "--append-eod",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = {
        "own": [{"page": text[:150]} for text in texts[:4]],
        "choice": [{"begin": WORDS[n % 6], "choices": WORDS[:4], "label": n % 4} for n in range(6)],
        "written": [{"begin": WORDS[n % 6], "end": "sat"} for n in range(3)],
    }
    kinds = {
        "own": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{page}}'\n"
        "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n",
        "choice": "output_type: multiple_choice\ndoc_to_text: '{{begin}}'\ndoc_to_target: label\n"
        "doc_to_choice: '{{choices}}'\nmetric_list: [{metric: acc}]\n",
        "written": "output_type: generate_until\ndoc_to_text: '{{begin}}'\ndoc_to_target: '{{end}}'\n"
        "generation_kwargs: {until: [' '], max_gen_toks: 6}\nmetric_list: [{metric: exact_match}]\n",
    }
    (folder / "own_tasks").mkdir()
    for name, kind in kinds.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        (folder / "own_tasks" / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {file}}}}}\n"
            f"test_split: test\n{kind}"
        )
    config = tiny_config(
        model={"vocab_size": None, "max_position_embeddings": 256, "hidden_dropout": 0.1},
        data={"train": (str(folder / "text_text_document"),)},
        training={"train_steps": 6},
        checkpoint={"save_interval_steps": 2, "keep_last": 0},
        optimizer={"lr_decay_steps": 6},
    )
    save_config(config, folder / "run.yaml")
    return folder


def train(folder: Path, name: str, *options: object, tasks: str = "own,choice,written", code: int = 0) -> str:
    of_tasks: list[object] = []
    if tasks:
        of_tasks = ["--telemetry.eval-tasks", tasks, "--telemetry.eval-tasks-include-path", folder / "own_tasks"]
        of_tasks += ["--telemetry.eval-tasks-interval-steps", 2]
    done = run_command(
        "pretrain", "--config", folder / "run.yaml", "--run-dir", folder / name, "--runtime.num-threads", 1,
        *of_tasks, *options,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done.stderr


def lines(folder: Path, name: str, key: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if key in line]


def figures(line: Mapping[str, Any]) -> list[float]:
    return [line[name] for name in FIGURES]


@pytest.fixture(scope="module")
def measured(folder: Path) -> Path:
    """A run that is measured at every second step, and keeps the best weights by a task."""
    said = train(folder, "measured", "--checkpoint.keep-best", "eval/own/bits_per_byte")
    assert "tasks at step 2: " in said
    return folder / "measured"


def test_figures_are_those_of_evaluate_and_training_does_not_notice(folder: Path, measured: Path) -> None:
    evaluations = lines(folder, "measured", "evaluation_seconds")
    assert [line["step"] for line in evaluations] == [2, 4, 6]
    for line in evaluations[::2]:
        output = folder / f"found{line['step']}.json"
        done = run_command(
            "evaluate", "--checkpoint", measured / f"checkpoints/step_{line['step']:08d}", "--tasks",
            "own,choice,written", "--include-path", folder / "own_tasks", "--output", output,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        results = json.loads(output.read_text())["results"]
        assert figures(line) == pytest.approx(
            [results[name.split("/")[1]][f"{name.split('/')[2]},none"] for name in FIGURES], rel=1e-6
        )
    train(folder, "plain", tasks="")
    assert [line["loss"] for line in lines(folder, "plain", "loss")] == [
        line["loss"] for line in lines(folder, "measured", "loss")
    ]
    first, second = (saved_tensors(folder / name / "checkpoints/step_00000006") for name in ("plain", "measured"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_best_weights_are_kept_and_curves_drawn(folder: Path, measured: Path) -> None:
    of_step = {line["step"]: line["eval/own/bits_per_byte"] for line in lines(folder, "measured", "evaluation_seconds")}
    best = min(of_step, key=lambda step: of_step[step])
    assert json.loads((measured / "best.json").read_text()) == {
        "metric": "eval/own/bits_per_byte", "value": of_step[best], "step": best,
    }  # fmt: skip
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(measured / "tensorboard")).Reload()
    assert [(one.step, one.value) for one in events.Scalars("eval/own/bits_per_byte")] == [
        (step, pytest.approx(value)) for step, value in of_step.items()
    ]


@pytest.mark.parametrize("layout", [TP_SP, PP2, CP2_SHARDED], ids=["TP2+SP", "PP2", "CP2 DP2 sharded"])
def test_figures_are_the_same_at_every_layout(folder: Path, tmp_path: Path, layout: tuple[object, ...]) -> None:
    options: list[object] = ["--model.hidden-dropout", 0, "--training.train-steps", 2]
    options += ["--checkpoint.save-interval-steps", 0]
    options += ["--data.split", "100,0,0"]  # validation would bring the parameters of replicas up to date
    if not (folder / "one").exists():
        train(folder, "one", *options)
    name = f"at{len(list(folder.glob('at*')))}"
    train(folder, name, *options, *layout)
    (one,), (other,) = (lines(folder, run, "evaluation_seconds") for run in ("one", name))
    assert figures(other) == pytest.approx(figures(one), rel=2e-5)


def test_what_a_stop_left_is_measured_by_the_next_start(folder: Path, measured: Path) -> None:
    train(folder, "stopped", "--training.train-steps", 4)
    file = folder / "stopped" / "metrics.jsonl"
    kept = [line for line in file.read_text().splitlines() if '"step": 4' not in line or '"loss"' in line]
    file.write_text("\n".join(kept) + "\n")
    train(folder, "stopped")
    evaluations = lines(folder, "stopped", "evaluation_seconds")
    assert [line["step"] for line in evaluations] == [2, 4, 6]
    (next_step,) = [line for line in lines(folder, "stopped", "loss") if line["step"] == 5]
    assert next_step["evaluating_seconds"] == pytest.approx(evaluations[1]["evaluation_seconds"], rel=0.2)
    assert [figures(line) for line in evaluations] == [
        figures(line) for line in lines(folder, "measured", "evaluation_seconds")
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--telemetry.eval-tasks", "hellaswag"), "which is not on this machine"),
        (("--checkpoint.keep-best", "eval/own/acc"), "there are eval/choice/acc, eval/own/bits_per_byte"),
        (("--telemetry.eval-tasks-chat-template", True), "the tokenizer has no chat template"),
    ],
    ids=lambda value: str(value[1]) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_measured_is_refused(
    folder: Path, tmp_path: Path, options: tuple[object, ...], words: str
) -> None:
    said = train(folder, "refused", *options, code=2)
    assert words in said
    assert "step" not in said  # before training
    assert not (folder / "refused").exists()


def test_what_only_training_has_is_left_out_of_the_model_that_measures() -> None:
    """What a GPU would build, as far as a machine without one can tell."""
    from megatron_7b.model.kernels import resolve_transformer_impl
    from megatron_7b.training.task_evaluation import evaluated_config

    run = tiny_config(
        model={"transformer_impl": "auto"},
        precision={"fp8": "hybrid", "fp8_param_gather": True},
        runtime={"cuda_graph_impl": "local"},
    )
    assert resolve_transformer_impl(evaluated_config(run), "cuda") == ("local", "requested")
