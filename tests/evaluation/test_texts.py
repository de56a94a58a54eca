"""How well a checkpoint predicts texts: every token once, as transformers has it, at every layout."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_7b.checkpoint.base import weights_identity
from megatron_7b.checkpoint.manifest import read_manifest
from megatron_7b.conversion.model_card import kept_card_figures
from megatron_7b.evaluation.texts import windows_of
from megatron_7b.tokenizer import load_tokenizer
from tests.conversion.tiny_models import save_tiny_model, save_tiny_tokenizer
from tests.data.corpora import write_corpus
from tests.support.commands import run_command
from tests.support.small_disk import small_disk

TEXTS = ["the cat sat on the mat " * 30, "naïve 12 o'clock 猫坐", "a dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts")
    save_tiny_model("llama", path / "hf", vocab_size=300)
    save_tiny_tokenizer(path / "hf")
    assert run_command("convert", "from-hf", "--input", path / "hf", "--output", path / "checkpoint").returncode == 0
    lines = [json.dumps({"text": text}) for text in TEXTS]
    (path / "it.jsonl").write_text("\n".join([*lines[:2], '{"text": 3}', lines[2]]))
    return path


def reference(folder: Path, text: str, stride: int) -> float:
    """Nats of a text by transformers, window by window."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids = [begin, *tokenizer.encode(text, add_special_tokens=False)]
    longest, nats, done = model.config.max_position_embeddings, 0.0, 1
    while done < len(ids):
        end = min(len(ids), longest + 1 if done == 1 else done + stride)
        window = torch.tensor(ids[max(0, end - longest - 1) : end])
        losses = torch.nn.functional.cross_entropy(
            model(window[None, :-1]).logits[0].double(), window[1:], reduction="none"
        )
        nats += float(losses[done - end :].sum())
        done = end
    return nats


@pytest.mark.parametrize(("stride", "ranks"), [(None, 1), (40, 2)])
def test_each_text_costs_what_transformers_says(folder: Path, tmp_path: Path, stride: int | None, ranks: int) -> None:
    more = () if stride is None else ("--stride", stride)
    done = run_command(
        "evaluate", "--checkpoint", folder / "checkpoint", "--text", folder / "it.jsonl", "--json", *more,
        "--per-document", tmp_path / "each.jsonl", "--nproc", ranks,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    each = [json.loads(line) for line in (tmp_path / "each.jsonl").read_text().splitlines()]
    assert [one["record"] for one in each] == [1, 2, 4]
    assert [one["bytes"] for one in each] == [len(text.encode()) for text in TEXTS]
    assert [one["words"] for one in each] == [180, 5, 2]
    nats = [reference(folder, text, stride or 256) for text in TEXTS]
    assert [one["nats"] for one in each] == pytest.approx(nats, rel=1e-5)
    total = json.loads(done.stdout.splitlines()[-1])
    assert total["bits_per_byte"] == pytest.approx(
        sum(nats) / math.log(2) / sum(one["bytes"] for one in each), rel=1e-5
    )
    assert total["word_perplexity"] == pytest.approx(math.exp(sum(nats) / 187), rel=1e-4)
    assert "it.jsonl:3" in done.stdout + done.stderr  # the record that is no text


def test_checkpoints_share_a_table_of_texts(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": TEXTS[0]}))
    other = tmp_path / "other"
    shutil.copytree(folder / "checkpoint", other)
    files = ("--text", folder / "it.jsonl", tmp_path / "long.jsonl", "--json")
    alone = json.loads(run_command("evaluate", "--checkpoint", other, *files).stdout.splitlines()[-1])
    done = run_command("evaluate", "--checkpoint", folder / "checkpoint", other, *files)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["results"]
    assert [Path(row["file"]).name for row in rows] == ["it.jsonl", "long.jsonl", "all"] * 2
    assert [row["bits_per_byte"] for row in rows[:3]] == [row["bits_per_byte"] for row in rows[3:]]
    assert rows[2]["bits_per_byte"] == pytest.approx(alone["bits_per_byte"])
    assert "it.jsonl:3" in done.stdout + done.stderr
    refused = run_command(
        "evaluate", "--checkpoint", folder / "checkpoint", other, *files, "--per-document", tmp_path / "e"
    )
    assert (refused.returncode, (tmp_path / "e").exists()) == (2, False)


def test_figures_of_texts_and_corpora_are_kept_for_the_model_card(folder: Path, tmp_path: Path) -> None:
    """In a checkpoint's own folder; the last line of the output is JSON all the same."""
    (tmp_path / "more").mkdir()
    for name, text in (("a.jsonl", TEXTS[0]), ("more/a.jsonl", TEXTS[2]), ("猫.jsonl", TEXTS[1])):
        (tmp_path / name).write_text(json.dumps({"text": text}))
    shutil.copytree(folder / "checkpoint", tmp_path / "one")
    shutil.copytree(folder / "checkpoint", tmp_path / "two")
    prefix = write_corpus(tmp_path / "speech", [load_tokenizer(folder / "hf").encode(TEXTS[0])])
    kept: dict[str, Any] = {}
    for flags in (
        ("--checkpoint", tmp_path / "one", "--text", tmp_path / "a.jsonl", tmp_path / "猫.jsonl"),
        ("--checkpoint", tmp_path / "one", tmp_path / "two", "--text", tmp_path / "a.jsonl", tmp_path / "more/a.jsonl"),
        ("--checkpoint", tmp_path / "one", "--data", prefix, "--data.seq-length", 16),
    ):
        done = run_command("evaluate", *flags, "--keep", "--json", "--runtime.num-threads", 1)
        assert done.returncode == 0, done.stderr
        figures = json.loads(done.stdout.splitlines()[-1])
        *_, name = sorted((tmp_path / "one" / "evaluations").iterdir(), key=lambda file: file.stat().st_mtime_ns)
        kept[name.name] = figures
    assert len(list((tmp_path / "two" / "evaluations").iterdir())) == 1
    assert {"texts-a.jsonl+猫.jsonl.json", "corpus-speech.json"} < set(kept)  # the other has the paths of both files
    found = {
        (one.task, one.measure): one.value
        for one in kept_card_figures(tmp_path / "one", weights_identity(read_manifest(tmp_path / "one")), print)
    }
    assert found["speech", "loss"] == kept["corpus-speech.json"]["loss"]
    texts = kept["texts-a.jsonl+猫.jsonl.json"]["files"]
    assert found["猫.jsonl", "bits_per_byte"] == texts[str(tmp_path / "猫.jsonl")]["bits_per_byte"]
    assert (str(tmp_path / "more/a.jsonl"), "word_perplexity") in found
    assert {measure for _, measure in found} == {"loss", "perplexity", "bits_per_byte", "word_perplexity"}


@pytest.mark.parametrize(
    ("lines", "flags", "words"),
    [
        ('{"text": "a"}', ["--json-key", "txt"], "1 bad records, the first"),
        ('{"text": ""}\n\n', [], "the files are empty, or all their texts are"),
        ('{"text": "a"}', ["--batch-size", 0], "--batch-size is 0"),
        ('{"text": "a"}', ["--per-document", "."], "is a folder; expected a file"),
    ],
)
def test_nothing_measured_is_no_success(
    folder: Path, tmp_path: Path, lines: str, flags: list[object], words: str
) -> None:
    (tmp_path / "it.jsonl").write_text(lines)
    lost = tmp_path / "each.jsonl"
    done = run_command(
        "evaluate",
        "--checkpoint",
        folder / "checkpoint",
        "--text",
        tmp_path / "it.jsonl",
        "--per-document",
        lost,
        *flags,
    )
    assert (done.returncode != 0, words in done.stderr, lost.exists()) == (True, True, False), done.stderr
    assert "\nerror:" in f"\n{done.stderr}"


def test_a_full_disk_costs_no_figures(folder: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "full", 4) as full:
        (full / "it.jsonl").write_bytes(bytes(4096))
        done = run_command(
            "evaluate", "--checkpoint", folder / "checkpoint", "--text", folder / "it.jsonl", "--json",
            "--per-document", full / "each.jsonl",
        )  # fmt: skip
        assert done.returncode == 1
        assert f"{full / 'each.jsonl'} cannot be written: No space left on device" in done.stderr
        assert [path.name for path in full.iterdir()] == ["it.jsonl"]
    found = json.loads(done.stdout.splitlines()[-1])
    rescued = re.search(r"it is in (\S+) instead", done.stderr)
    assert rescued is not None
    each = [json.loads(line) for line in Path(rescued[1]).read_text().splitlines()]
    assert (len(each), sum(one["nats"] for one in each)) == (3, pytest.approx(found["nats"]))
    shutil.rmtree(Path(rescued[1]).parent)


def test_windows_predict_each_token_once() -> None:
    for length, stride in ((5, 3), (10, 10), (23, 3), (31, 10), (12, 1)):
        windows = list(windows_of(range(length), 99, longest=10, stride=stride))
        assert [token for window in windows for token in window.continuation_ids] == list(range(length))
        assert all(len(one.context_ids) + len(one.continuation_ids) <= 11 for one in windows)
        assert all(len(one.context_ids) + len(one.continuation_ids) == 11 for one in windows[1:])
