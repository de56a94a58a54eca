"""Classic tasks from files to predictions: training, layouts, prediction that continues, export."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_7b.checkpoint import resolve_checkpoint
from megatron_7b.prediction.files import plan_job
from megatron_7b.prediction.predicting import read_prediction_setup
from tests.conversion.tiny_models import save_tiny_model, save_tiny_tokenizer
from tests.support.commands import run_command
from tests.support.small_disk import small_disk

COMMON: tuple[object, ...] = (
    *("--config", "classify_tiny_cpu", "--precision.params-dtype", "fp32", "--telemetry.plot", "False"),
    *("--training.train-steps", 4, "--training.global-batch-size", 4, "--training.micro-batch-size", 2),
    *("--data.seq-length", 32, "--data.split", "80,20,0", "--optimizer.lr", 1e-3),
)
WORDS = ["cat", "mat", "sat", "the", "on", "nap"]


def texts(count: int) -> list[dict[str, Any]]:
    return [
        {"text": " ".join(WORDS[: 2 + number % 4]), "text_pair": "the cat's nap", "label": ["up", "down"][number % 2]}
        for number in range(count)
    ]


def tagged(count: int) -> list[dict[str, Any]]:
    return [
        {"tokens": WORDS[number % 3 :], "tags": ["B-X", "I-X", *["O"] * (4 - number % 3)]} for number in range(count)
    ]


def asked(count: int) -> list[dict[str, Any]]:
    contexts = [" ".join([*WORDS[number % 4 :], *WORDS * 4]) for number in range(count)]
    return [
        {
            "question": "the mat 12",
            "context": context,
            "answers": [{"text": "on nap", "answer_start": context.index("on nap")}] if number % 3 else [],
        }
        for number, context in enumerate(contexts)
    ]


TASKS = {"text_classification": texts, "token_classification": tagged, "question_answering": asked}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a tokenizer of its kind, and a file of records for each task."""
    from megatron_7b.tokenizer.train import BpeOptions, save_hugging_face_folder, train_bpe

    path = tmp_path_factory.mktemp("classic")
    save_tiny_model("bert", path / "model", vocab_size=300)
    options = BpeOptions(vocab_size=300, special_tokens=("[PAD]", "[CLS]", "[SEP]", "[MASK]"), split_digits=True)
    lines = ["the cat sat on the mat, the cat's 12 o'clock 123 nap  "] * 20
    save_hugging_face_folder(train_bpe(iter([lines]), options), options, path / "model")
    for task, records in TASKS.items():
        (path / f"{task}.jsonl").write_text("\n".join(map(json.dumps, records(24))))
    return path


def finetune(folder: Path, task: str, run: Path, *more: object) -> Any:
    start = ("--checkpoint.initialize-from", folder / "model", "--data.train", folder / f"{task}.jsonl")
    return run_command("finetune", *COMMON, "--finetune.task", task, "--run-dir", run, *start, *more)


def metrics(run: Path, key: str) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def predict(run: Path, source: Path, output: Path, *more: object) -> Any:
    return run_command("predict", "--checkpoint", run, "--input", source, "--output", output, *more)


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def trained(folder: Path, task: str, run: Path, *layout: object) -> list[dict[str, Any]]:
    """Train, predict on the training file, and return the lines; they are those of the input with more."""
    done = finetune(folder, task, run, *layout)
    assert done.returncode == 0, done.stderr
    assert 0 <= metrics(run, "validation_accuracy")[-1] <= 1
    assert len(metrics(run, "grad_norm")) == 4  # as asked, whatever epochs the preset has
    done = predict(run, folder / f"{task}.jsonl", run.with_suffix(".jsonl"))
    assert done.returncode == 0, done.stderr
    found = lines_of(run.with_suffix(".jsonl"))
    inputs = [{key: value for key, value in line.items() if key != "prediction"} for line in found]
    assert inputs == lines_of(folder / f"{task}.jsonl")
    return found


def test_classes_at_several_layouts_and_in_transformers(folder: Path, tmp_path: Path) -> None:
    """At TP1 and TP2 with sequence parallelism the same losses; predictions at PP2, begun again, too; exported."""
    run, task = tmp_path / "run", "text_classification"
    found = trained(folder, task, run)
    layout = ("--nproc", 2, "--parallel.tensor-model-parallel-size", 2, "--parallel.sequence-parallel", "True")
    assert finetune(folder, task, tmp_path / "tp2", *layout).returncode == 0
    assert metrics(tmp_path / "tp2", "loss") == pytest.approx(metrics(run, "loss"), abs=1e-5)
    done = run_command("evaluate", "--checkpoint", run, "--data", folder / f"{task}.jsonl", "--keep", "--json")
    assert done.returncode == 0, done.stderr
    (kept,) = (run / "checkpoints").glob(f"step_*/evaluations/labels-{task}.jsonl.json")
    (figures,) = json.loads(kept.read_text())["results"].values()
    assert figures["macro_f1,none"] == json.loads(done.stdout.splitlines()[-1])["macro_f1"]
    (tmp_path / "two.jsonl.part").write_text(json.dumps(found[0]) + "\n")
    refused = predict(run, folder / f"{task}.jsonl", tmp_path / "two.jsonl")
    assert refused.returncode == 2
    assert "begun with another checkpoint" in refused.stderr
    (tmp_path / "two.jsonl.part.json").touch()  # of a disk that was full
    refused = predict(run, folder / f"{task}.jsonl", tmp_path / "two.jsonl")
    assert (refused.returncode, "begun with another checkpoint" in refused.stderr) == (2, True), refused.stderr
    layout = ("--nproc", 2, "--parallel.pipeline-model-parallel-size", 2, "--overwrite")
    done = predict(run, folder / f"{task}.jsonl", tmp_path / "two.jsonl", *layout)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.glob("two.jsonl.*"))
    for one, other in zip(found, lines_of(tmp_path / "two.jsonl"), strict=True):
        assert flat(other["prediction"]) == pytest.approx(flat(one["prediction"]), abs=2e-5)
    check_export(run, found, tmp_path / "hf")


def test_tags_of_words(folder: Path, tmp_path: Path) -> None:
    for line in trained(folder, "token_classification", tmp_path / "run"):
        assert len(line["prediction"]["tags"]) == len(line["tokens"])
        assert set(line["prediction"]["tags"]) <= {"O", "B-X", "I-X"}
        for entity in line["prediction"]["entities"]:
            assert entity["text"] == " ".join(line["tokens"][entity["start"] : entity["end"]])
    refused = run_command("generate", "--checkpoint", tmp_path / "run", "--prompt", "the cat")
    assert "a head for token_classification, which writes no text" in refused.stderr


def test_answers_and_the_rest_of_an_interrupted_prediction(folder: Path, tmp_path: Path) -> None:
    run, source, output = tmp_path / "run", folder / "question_answering.jsonl", tmp_path / "two.jsonl"
    found = trained(folder, "question_answering", run)
    for line in found:
        answer = line["prediction"]
        assert answer["answer"] == (line["context"][answer["start"] : answer["end"]] if answer["answer"] else "")
        assert 0 <= answer["no_answer_score"] <= 1
    setup = read_prediction_setup(resolve_checkpoint(run))
    plan_job(setup, str(source), str(output), overwrite=False)  # which notes what the file is begun with
    Path(f"{output}.part").write_text("\n".join(map(json.dumps, found[:3])) + '\n{"question": "the m')
    done = predict(run, source, output)
    assert done.returncode == 0, done.stderr
    assert "continuing after 3 lines" in done.stderr
    assert lines_of(output) == found
    Path(f"{output}.part").write_text("")
    assert "exists already" in predict(run, source, output).stderr
    with small_disk(tmp_path / "disk", 8) as disk:
        (disk / "full").write_bytes(b"x" * 4096)
        full = predict(run, source, disk / "two.jsonl").stderr
        assert f"No space left on device: '{disk / 'two.jsonl.part'}'\nhint: free some room, and give the same" in full


def flat(prediction: dict[str, Any]) -> dict[str, Any]:
    """A prediction without nesting, as `pytest.approx` takes it; what is no number must be equal."""
    scores = {f"score of {name}": score for name, score in prediction.get("scores", {}).items()}
    rest = {key: value for key, value in prediction.items() if key not in ("scores", "score", "no_answer_score")}
    return {**scores, "score": prediction.get("score", 0.0), json.dumps(rest): 1.0}


def check_export(run: Path, found: list[dict[str, Any]], hf: Path) -> None:
    """Compare with what transformers makes of the exported folder."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, BertForSequenceClassification

    exported = run_command("convert", "to-hf", "--checkpoint", run, "--output", hf)
    assert exported.returncode == 0, exported.stderr
    assert AutoConfig.from_pretrained(hf).id2label == {0: "down", 1: "up"}
    model, tokenizer = BertForSequenceClassification.from_pretrained(hf).eval(), AutoTokenizer.from_pretrained(hf)
    cls, sep = (tokenizer.convert_tokens_to_ids(name) for name in ("[CLS]", "[SEP]"))
    for line in found[:6]:
        first, second = (tokenizer.encode(line[key], add_special_tokens=False) for key in ("text", "text_pair"))
        ids = torch.tensor([[cls, *first, sep, *second, sep]])
        types = torch.tensor([[0] * (len(first) + 2) + [1] * (len(second) + 1)])
        with torch.no_grad():
            shares = model(input_ids=ids, token_type_ids=types).logits.softmax(-1)[0].tolist()
        assert list(line["prediction"]["scores"].values()) == pytest.approx(shares, abs=1e-5)
    # It can be trained further, but not into other labels without a word.
    file = run.parent / "again.jsonl"
    file.write_text("\n".join(map(json.dumps, [{"text": "the cat", "text_pair": "a", "label": "sideways"}] * 8)))
    start = ("--checkpoint.initialize-from", hf, "--data.train", file, "--finetune.task", "text_classification")
    refused = run_command("finetune", *COMMON, "--run-dir", hf.parent / "again", *start)
    assert "classify into down, up; data.train has also sideways" in refused.stderr


def test_a_label_that_was_never_trained_is_named(folder: Path, tmp_path: Path) -> None:
    valid = tmp_path / "valid.jsonl"
    valid.write_text("\n".join(map(json.dumps, [*texts(1), {**texts(1)[0], "label": "left"}])))
    done = finetune(folder, "text_classification", tmp_path / "run", "--data.valid", valid)
    assert done.returncode == 1
    assert f"{valid}:2: 'label' is 'left', which is none of those learned: down, up" in done.stderr
    assert not list(tmp_path.glob("run/base*"))


def test_a_head_beside_an_adapter_goes_to_peft_and_into_a_merged_model(tmp_path: Path) -> None:
    """The base, a decoder, has an output layer instead; both exports are compared with what the run computes."""
    save_tiny_model("llama", tmp_path / "model", vocab_size=300)
    save_tiny_tokenizer(tmp_path / "model")
    (tmp_path / "text_classification.jsonl").write_text("\n".join(map(json.dumps, texts(24))))
    done = finetune(tmp_path, "text_classification", tmp_path / "run", "--adapter.method", "lora", "--adapter.rank", 2)
    assert done.returncode == 0, done.stderr
    for name, more in (("peft", ()), ("merged", ("--merge",))):
        done = run_command("convert", "to-hf", "--checkpoint", tmp_path / "run", "--output", tmp_path / name, *more)
        assert done.returncode == 0, done.stderr
        assert "parity" in done.stderr + done.stdout
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["architectures"] == [
        "LlamaForSequenceClassification"
    ]
