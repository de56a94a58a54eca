"""lm-evaluation-harness on a checkpoint: item by item what its own `hf` model gives the export, at every layout."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_7b.errors import ConfigError
from megatron_7b.evaluation.harness import HarnessOptions
from megatron_7b.evaluation.harness.running import load_tasks
from tests.conversion.tiny_models import save_tiny_model, save_tiny_tokenizer
from tests.support.commands import run_command

pytest.importorskip("lm_eval")

WORDS = ["the cat", "sat", "on the mat", "naïve", "12 o'clock", "a dog"]
CHOICES = {"text": WORDS[:4], "label": ["A", "B", "C", "D"]}
TASKS = (
    "hellaswag,arc_easy,gsm8k,lambada_openai,mmlu_abstract_algebra,cmmlu_agronomy,ceval-valid_accountant,sst2,own,"
    "mrpc,cola,copa,qqp,qnli,mnli,mnli_mismatch,wnli,rte,boolq,cb,wic,wsc,multirc,record"
)


def data_sets() -> dict[str, list[dict[str, Any]]]:
    """Rows of each format that tasks read, by file."""
    sets: dict[str, list[dict[str, Any]]] = {
        **glue_data_sets(),
        "hellaswag/validation.jsonl": [
            {"activity_label": "Cats", "ctx_a": WORDS[n % 6], "ctx_b": "it", "endings": WORDS[:4], "label": str(n % 4)}
            for n in range(6)
        ],
        "ai2_arc/ARC-Easy/test.jsonl": [
            {"question": WORDS[n % 6] + "?", "choices": CHOICES, "answerKey": "ABCD"[n % 4]} for n in range(6)
        ],
        "lambada_openai/default/test.jsonl": [{"text": f"{WORDS[n % 6]} sat on the mat"} for n in range(5)],
        "own.jsonl": [{"page": " ".join(WORDS * (n + 1))} for n in range(3)],
    }
    for name in (
        "hellaswag/validation",
        "ai2_arc/ARC-Easy/test",
        "lambada_openai/default/test",
    ):
        sets[f"{name.rpartition('/')[0]}/train.jsonl"] = sets[f"{name}.jsonl"]
    for split in ("train", "test"):
        sets[f"gsm8k/main/{split}.jsonl"] = [{"question": f"{n} cats?", "answer": f"{n} #### {n}"} for n in range(6)]
    for split in ("dev", "test"):
        sets[f"mmlu/abstract_algebra/{split}.jsonl"] = [
            {"question": WORDS[n % 6], "choices": WORDS[:4], "answer": n % 4} for n in range(6)
        ]
        lettered = dict(zip("ABCD", WORDS, strict=False))
        sets[f"cmmlu/agronomy/{split}.csv"] = [
            {"Question": f"{n}问", **lettered, "Answer": "ABCD"[n % 4]} for n in range(6)
        ]
        sets[f"ceval-exam/accountant/accountant_{split.replace('test', 'val')}.csv"] = [
            {"id": n, "question": f"{n}问", **lettered, "answer": "ABCD"[n % 4], "explanation": ""} for n in range(6)
        ]
    return sets


def glue_data_sets() -> dict[str, list[dict[str, Any]]]:
    """Rows of GLUE and SuperGLUE under the names that the hub's data sets have."""
    one, other = (lambda n: WORDS[n % 6]), (lambda n: WORDS[n % 5])
    rows: dict[str, Callable[[int], dict[str, Any]]] = {
        "glue/sst2": lambda n: {"sentence": one(n)},
        "glue/cola": lambda n: {"sentence": one(n)},
        "glue/mrpc": lambda n: {"sentence1": one(n), "sentence2": other(n)},
        "glue/rte": lambda n: {"sentence1": one(n), "sentence2": other(n)},
        "glue/wnli": lambda n: {"sentence1": one(n), "sentence2": other(n)},
        "glue/qqp": lambda n: {"question1": one(n), "question2": other(n)},
        "glue/qnli": lambda n: {"question": one(n), "sentence": other(n)},
        "glue/mnli": lambda n: {"premise": one(n), "hypothesis": other(n), "label": n % 3},
        "super_glue/boolq": lambda n: {"question": one(n), "passage": other(n)},
        "super_glue/cb": lambda n: {"premise": one(n), "hypothesis": other(n), "label": n % 3},
        "super_glue/copa": lambda n: {
            "premise": "It sat.",
            "choice1": "It ran.",
            "choice2": "It ate.",
            "question": "cause",
        },
        "super_glue/wic": lambda n: {
            "word": "cat",
            "sentence1": f"the cat {one(n)}",
            "sentence2": f"a cat {other(n)}",
            "start1": 4,
            "end1": 7,
            "start2": 2,
            "end2": 5,
        },
        "super_glue/wsc.fixed": lambda n: {
            "text": f"The dog saw {one(n)} and it ran .",
            "span1_index": 0,
            "span1_text": "The dog",
            "span2_index": len(one(n).split()) + 4,
            "span2_text": "it",
        },
        "super_glue/multirc": lambda n: {
            "paragraph": other(n),
            "question": "What sat?",
            "answer": one(n),
            "idx": {"paragraph": 0, "question": n // 2, "answer": n % 2},
        },
        "super_glue/record": lambda n: {
            "passage": f"A {one(n)} sat .\n@highlight\nIt ran",
            "query": "@placeholder ran",
            "entities": WORDS[: 2 + n % 3],
            "answers": [WORDS[n % 2], WORDS[0]],
        },
    }
    found = {
        f"{name}/{split}.jsonl": [{"label": n % 2, "idx": n, **row(n)} for n in range(6)]
        for name, row in rows.items()
        for split in ("train", "validation")
    }
    validation = found.pop("glue/mnli/validation.jsonl")
    found["glue/mnli/validation_matched.jsonl"] = validation
    found["glue/mnli/validation_mismatched.jsonl"] = validation[::-1]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of both kinds, the data sets, and a task of one's own."""
    path = tmp_path_factory.mktemp("harness")
    save_tiny_model("llama", path / "hf", vocab_size=300)
    save_tiny_tokenizer(path / "hf")
    done = run_command("convert", "from-hf", "--input", path / "hf", "--output", path / "checkpoint")
    assert done.returncode == 0, done.stderr
    poor = {
        "super_glue/boolq/test.jsonl": [{"question": "?", "passage": "a", "label": 1}],
        "glue/rte/validation.jsonl": [{"sentence1": "a", "sentence2": "b", "label": 1}],
        "super_glue/cb/validation.jsonl": [
            {"premise": "a", "hypothesis": "b", "label": one} for one in ("True", "yes")
        ],
        "super_glue/wic/validation.jsonl": [
            {"sentence1": "a", "sentence2": "a", "start1": 0, "end1": 1, "label": -1},
        ],
    }
    files = {f"data/{name}": rows for name, rows in data_sets().items()}
    for name, rows in {**files, **{f"poor/{name}": rows for name, rows in poor.items()}}.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w", encoding="utf-8", newline="") as stream:
            if file.suffix == ".csv":
                writer = csv.DictWriter(stream, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
            else:
                stream.writelines(json.dumps(row) + "\n" for row in rows)
    (path / "tasks").mkdir()
    (path / "tasks" / "own.yaml").write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {path}/data/own.jsonl}}}}\n"
        "test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{page}}'\n"
        "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n"
    )
    return path


def evaluated(folder: Path, *more: object) -> dict[str, Any]:
    output = folder / f"found{len(list(folder.glob('found*')))}.json"
    done = run_command(
        *("evaluate", "--checkpoint", folder / "checkpoint", "--tasks", TASKS, "--task-data", folder / "data"),
        *("--include-path", folder / "tasks", "--gen-kwargs", "max_gen_toks=12", "--num-fewshot", 2),
        *("--log-samples", "--output", output, *more),
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(output.read_text())
    return found


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, Any]:
    """What the harness gives its own model of transformers."""
    from lm_eval import simple_evaluate

    from megatron_7b.evaluation.harness.tasks import find_tasks, local_data_sets

    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    manager = find_tasks(TASKS.split(","), [folder / "tasks"])
    with local_data_sets(folder / "data", may_download=False):
        results = simple_evaluate(
            model="hf", model_args={"pretrained": str(folder / "hf"), "dtype": "float32"}, tasks=TASKS.split(","),
            task_manager=manager, num_fewshot=2, gen_kwargs="max_gen_toks=12", device="cpu", batch_size=4,
            bootstrap_iters=0, log_samples=True, random_seed=1234, numpy_random_seed=1234, torch_random_seed=1234,
            fewshot_random_seed=1234,
        )  # fmt: skip
    assert results is not None
    return dict(results)


def test_every_item_is_that_of_the_harness_with_transformers(folder: Path, expected: dict[str, Any]) -> None:
    found = evaluated(folder, "--nproc", 2)
    assert found["samples"].keys() == set(TASKS.split(","))
    for task, samples in expected["samples"].items():
        ours = {(one["doc_id"], one["filter"]): one for one in found["samples"][task]}
        assert len(ours) == len(samples)
        for one in samples:
            other = ours[one["doc_id"], one["filter"]]
            assert other["arguments"] is not None
            for mine, theirs in zip(_flat(other["resps"]), _flat(one["resps"]), strict=True):
                if isinstance(theirs, float):
                    assert float(mine) == pytest.approx(theirs, abs=1e-4), task
                else:
                    assert str(mine) == str(theirs), task
    for task, figures in expected["results"].items():
        for name, value in figures.items():
            if "," in name and "stderr" not in name and isinstance(value, float):
                assert found["results"][task][name] == pytest.approx(value, rel=1e-4), (task, name)


def test_answers_are_compared_as_transformers_4_did(expected: dict[str, Any]) -> None:
    """transformers 5 has no such module any more, but `record` imports it."""
    from lm_eval.tasks.super_glue.record.util import process_results

    row = {"entities": ["cat", "the cats sat"], "answers": ["The  cat sat!", "a dog"]}
    assert process_results(row, [(-1.0, False), (-0.5, False)]) == {"f1": pytest.approx(0.5), "em": 0}
    assert process_results(row, [(-0.1, False), (-0.5, False)]) == {"f1": pytest.approx(2 / 3), "em": 0}
    assert process_results({**row, "answers": ["(A) Cat."]}, [(-0.1, False), (-0.5, False)]) == {"f1": 1.0, "em": 1}
    assert {"f1,none", "em,none"} <= expected["results"]["record"].keys()


def test_the_harness_knows_checkpoints_by_name(folder: Path, expected: dict[str, Any], tmp_path: Path) -> None:
    """Its own command, with ours among its models."""
    command = ["-m", "megatron_7b.evaluation.harness", "run", "--model", "megatron_7b", "--tasks", "own"]
    arguments = ["--model_args", f"checkpoint={folder}/checkpoint", "--include_path", str(folder / "tasks")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *command, *arguments, "--output_path", str(tmp_path)],
        cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.rglob("results_*.json")
    found = json.loads(file.read_text())["results"]["own"]
    wanted = expected["results"]["own"]["word_perplexity,none"]
    assert found["word_perplexity,none"] == pytest.approx(wanted, rel=1e-4)
    from megatron_7b.evaluation.harness.registered import CheckpointLM

    with pytest.raises(ConfigError, match="model_args has pretrained, expected checkpoint, tokenizer"):
        CheckpointLM("x", pretrained=1)


def _flat(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return [leaf for one in value for leaf in _flat(one)]
    return [value]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tasks": ("hellaswagg",)}, "there is no task hellaswagg\nhint: near it: hellaswag, "),
        ({"tasks": ("winogrande",)}, "winogrande \\(winogrande_xl\\), which is not on this machine"),
        ({"tasks": ("boolq",), "task_data": Path("poor")}, "boolq have no rows .*\\n.*none in train, validation"),
        ({"tasks": ("rte",), "task_data": Path("poor"), "num_fewshot": 3}, "rte takes 3 examples from the split train"),
        ({"tasks": ("boolq",), "num_fewshot": 999}, "boolq takes 999 examples .* give at most \\d+"),
        ({"tasks": ("own",), "gen_kwargs": "a=1,b"}, "gen_kwargs has 'b', expected NAME=VALUE"),
        ({"tasks": ("cb",), "task_data": Path("poor")}, "cb: row 1 of its data has the label 'yes', expected 0 to 2"),
        ({"tasks": ("wic",), "task_data": Path("poor")}, "wic: row 0 of its data has the label -1, expected 0 to 1"),
        ({"tasks": ("own",), "include_path": (Path("nowhere"),)}, "nowhere is not a folder"),
        ({"tasks": ("hellaswag",), "limit": 0}, "limit is 0, expected at least 1"),
    ],
)
def test_what_cannot_be_measured_is_said_before_a_model_is_built(
    folder: Path, options: dict[str, Any], words: str
) -> None:
    options = {**options, "task_data": folder / options.get("task_data", "data")}
    with pytest.raises(ConfigError, match=words):
        load_tasks(HarnessOptions(**options))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--tasks", "hellaswag", "--data", "x"), "--data and --tasks do not go together"),
        ((), "there is nothing to measure on"),
    ],
)
def test_the_command_wants_a_corpus_or_tasks(folder: Path, flags: tuple[object, ...], words: str) -> None:
    done = run_command("evaluate", "--checkpoint", folder / "checkpoint", *flags)
    assert done.returncode != 0
    assert words in done.stderr


def test_options_of_another_kind_of_measuring_are_refused(folder: Path) -> None:
    for flags, words in (
        (("--tasks", "hellaswag", "--stride", 4), "--stride applies to --text, not to --tasks"),
        (("--text", folder / "data", "--limit", 3), "--limit applies to --tasks, not to --text"),
        (("--data", "x", "--output", "y"), "--output applies to --tasks, not to a corpus"),
        (("--data", "x", "--max-samples", -1), "--max-samples is -1"),
    ):
        done = run_command("evaluate", "--checkpoint", folder / "checkpoint", *flags)
        assert done.returncode != 0
        assert words in done.stderr
