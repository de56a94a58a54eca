"""Whole runs: what comes out, that it adds up, and that it is the same after any interruption."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from megatron_7b.errors import ConfigError, DataFormatError
from megatron_7b.prepare.accounting import RunReport, StageCount
from megatron_7b.prepare.reading.inputs import find_inputs
from megatron_7b.prepare.recipe import load_recipe
from megatron_7b.prepare.running.heartbeat import Heartbeat
from megatron_7b.prepare.running.run import PrepareJob, build_plan, run_prepare
from megatron_7b.prepare.running.supervisor import Supervisor
from megatron_7b.prepare.running.workspace import read_lines
from tests.prepare.raw_files import SHORT, prose, write_raw_files
from tests.support.assets import REPOSITORY


class Silent:
    """Nobody is watching."""

    def __init__(self) -> None:
        self.advanced: list[tuple[str, int]] = []

    def begin(self, phase: str, total: int) -> None:
        self.advanced.append((phase, total))

    def advance(self, size: int) -> None:
        phase, left = self.advanced[-1]
        self.advanced[-1] = phase, left - size

    def warn(self, message: str) -> None:
        raise AssertionError(message)


def prepare(
    inputs: Sequence[Path],
    output: Path,
    overrides: dict[str, object] | None = None,
    *,
    workers: int = 1,
    overwrite: bool = False,
    keep_work: bool = False,
) -> RunReport:
    job = PrepareJob(
        inputs=find_inputs([str(path) for path in inputs]),
        output_folder=output,
        book=load_recipe([], {"language.languages": ["en"], "split.validation": 0.2, **(overrides or {})}),
        num_workers=workers,
        overwrite=overwrite,
        keep_work=keep_work,
    )
    progress = Silent()
    report = run_prepare(job, progress)
    assert all(left == 0 for _, left in progress.advanced)
    return report


def documents(folder: Path, split: str) -> list[dict[str, object]]:
    return [record for path in sorted((folder / split).glob("*")) for record in read_lines(path)]


def contents(folder: Path) -> dict[str, bytes]:
    """Everything but what a run says of its own speed."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and "work" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.stem != "report"}


def test_a_corpus_of_every_format(tmp_path: Path) -> None:
    inputs = write_raw_files(tmp_path / "raw")
    output = tmp_path / "clean"
    report = prepare(inputs, output)
    removed = Counter[str]()
    for stage in report.stages:
        removed.update(stage.removed)
    assert removed == {
        "language:de": 1,
        "gopher_quality:too_few_words": 1,
        "duplicate:exact": 1,
        "reading:http_status": 1,
    }
    assert report.stages[0].quarantined == 1
    train, validation = documents(output, "train"), documents(output, "validation")
    assert len(train) + len(validation) == 48 - 5
    assert validation
    by_file = Counter(Path(str(one["source_file"])).name for one in (*train, *validation))
    assert by_file == {"a.jsonl": 36, "b.txt": 1, "c.html": 1, "d.warc.gz": 5}
    mail = next(one for one in (*train, *validation) if str(one["source_file"]).endswith("b.txt"))
    assert str(mail["text"]).endswith("Mail me at <EMAIL>.")
    page = next(one for one in (*train, *validation) if one.get("url") == "http://example.org/2003")
    assert prose(2003, 200) in str(page["text"])
    assert (page["language"], page["http_status"]) == ("en", 200)
    with inputs[3].open("rb") as archive:
        archive.seek(int(str(page["source_record"])))
        assert "2003" in gzip.GzipFile(fileobj=archive).read(300).decode()
    quarantine = list(read_lines(output / "quarantine.jsonl"))
    assert [(one["position"], one["head"]) for one in quarantine] == [(10, '{"text": "cut off')]
    duplicate = next(read_lines(output / "dropped" / "exact_duplicates.jsonl"))
    assert (duplicate["position"], duplicate["detail"]) == (8, f"repeats {inputs[0]}:7")
    assert not (output / "work").exists()
    saved = RunReport.from_json(json.loads((output / "report.json").read_text()))
    assert saved == report
    assert "<svg" in (output / "report.html").read_text()


def test_any_number_of_workers_and_shards_give_the_same_documents(tmp_path: Path) -> None:
    inputs = write_raw_files(tmp_path / "raw", documents=150)
    one = tmp_path / "one"
    prepare(inputs, one, {"output.compression": "none"})
    cut = {"reading.shard_megabytes": 0.03, "output.compression": "none"}
    many = tmp_path / "many"
    prepare(inputs, many, cut, workers=3)
    assert len(list((many / "train").iterdir())) > 1
    for split in ("train", "validation"):
        assert documents(many, split) == documents(one, split)


def test_a_ray_cluster_gives_the_same_documents(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    inputs = write_raw_files(tmp_path / "raw")
    command = [sys.executable, "-m", "megatron_7b", "data", "prepare", "--input", *map(str, inputs), "--workers", "2"]
    command += ["--reading.shard-megabytes", "0.02", "--languages", "en", "--split.validation", "0.2"]
    there = ["--output-dir", str(tmp_path / "there"), "--ray-address", "local", "--ray-memory-gb", "0.1"]
    prepare(inputs, tmp_path / "here", {"reading.shard_megabytes": 0.02})
    done = subprocess.run([*command, *there], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_a_finished_run_is_found_and_another_one_refused(tmp_path: Path) -> None:
    inputs, output = write_raw_files(tmp_path / "raw"), tmp_path / "clean"
    first = prepare(inputs, output)
    written = (output / "report.json").stat().st_mtime_ns
    assert prepare(inputs, output) == first
    assert (output / "report.json").stat().st_mtime_ns == written
    with pytest.raises(ConfigError, match="holds the result of another recipe or other inputs"):
        prepare(inputs, output, {"quality.gopher_quality.min_words": 10})
    os.utime(inputs[0], ns=(0, 0))
    with pytest.raises(ConfigError, match="other inputs"):
        prepare(inputs, output)
    prepare(
        inputs,
        output,
        {"quality.gopher_repetition": "none", "quality.gopher_quality.min_words": 3, "split.validation": 0.0},
        overwrite=True,
    )
    assert len(documents(output, "train")) == 48 - 4
    assert not (output / "validation").exists()


def test_nothing_of_somebody_else_is_replaced(tmp_path: Path) -> None:
    inputs, output = write_raw_files(tmp_path / "raw"), tmp_path / "clean"
    (output / "train").mkdir(parents=True)
    (output / "train" / "mine").touch()
    with pytest.raises(ConfigError, match="files of another origin"):
        prepare(inputs, output)
    with pytest.raises(ConfigError, match="is in the output folder"):
        prepare(inputs, tmp_path / "raw")
    assert (output / "train" / "mine").exists()


def test_a_file_that_is_added_costs_only_itself(tmp_path: Path) -> None:
    inputs, output = write_raw_files(tmp_path / "raw"), tmp_path / "clean"
    one_each = {"reading.shard_megabytes": 0.1}
    prepare([*inputs], output, one_each, keep_work=True)
    kept = {path.name: path.stat().st_ctime_ns for path in (output / "work" / "documents").iterdir()}
    extra = tmp_path / "raw" / "e.jsonl"
    extra.write_text("\n".join(json.dumps({"text": prose(seed, 300)}) for seed in range(9000, 9100)))
    report = prepare([*inputs, extra], output, one_each, overwrite=True, keep_work=True)
    after = {path.name: path.stat().st_ctime_ns for path in (output / "work" / "documents").iterdir()}
    assert {name: after[name] for name in kept} == kept
    assert len(after) > len(kept)
    assert report.stages[0].documents_in == 48 + 100


def test_per_source_recipes(tmp_path: Path) -> None:
    inputs, output = write_raw_files(tmp_path / "raw"), tmp_path / "clean"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "per_source:\n"
        "  - files: '*.jsonl'\n"
        "    quality: {gopher_quality: {min_words: 3}, gopher_repetition: none}\n"
        "    language: {languages: [en, de]}\n"
        "  - files: ['*.txt', '*.html']\n"
        "    quality: {gopher_quality: none}\n"
        "    pii: {emails: false}\n"
    )
    book = load_recipe([recipe], {"duplicates.near": False})
    job = PrepareJob(inputs=find_inputs([str(path) for path in inputs]), output_folder=output, book=book)
    report = run_prepare(job, Silent())
    assert report.stages[-1].kept == 48 - 3
    texts = [str(one["text"]) for one in documents(output, "train")]
    assert any("jane.roe@example.org" in text for text in texts)
    assert any(text == SHORT for text in texts)


def test_nothing_left_says_what_happened(tmp_path: Path) -> None:
    inputs = write_raw_files(tmp_path / "raw")
    with pytest.raises(
        DataFormatError, match=r"(?s)no document is left of 48:.*gopher_quality:too_few_words"
    ) as caught:
        prepare(inputs, tmp_path / "clean", {"quality.gopher_quality.min_words": 5000})
    assert not (tmp_path / "clean" / "report.json").exists()
    folder = Path(str(caught.value).rpartition(" ")[2])
    assert (folder / "gopher_quality.jsonl").exists()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of a run in a dozen shards, beside its raw files."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    inputs = write_raw_files(folder / "raw", documents=160)
    prepare(inputs, folder / "clean", {"reading.shard_megabytes": 0.02}, workers=2)
    return folder / "clean"


@pytest.mark.parametrize("moment", ["documents", "corpus"])
def test_killed_and_run_again_it_is_the_same(tmp_path: Path, moment: str, uninterrupted: Path) -> None:
    inputs = sorted((uninterrupted.parent / "raw").iterdir())
    arguments = ["--input", *map(str, inputs), "--output-dir", str(tmp_path / "killed"), "--workers", "2"]
    options = ["--reading.shard-megabytes", "0.02", "--split.validation", "0.2", "--languages", "en"]
    command = [sys.executable, "-m", "megatron_7b", "data", "prepare", *arguments, *options]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wait_for(tmp_path / "killed" / "work" / moment, process)
    children = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until_gone(children)
    assert not (tmp_path / "killed" / "report.json").exists()
    before = {path.name for path in (tmp_path / "killed" / "work" / "documents").iterdir() if path.name[0] != "."}
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert before, "nothing was finished when it was killed"
    assert contents(tmp_path / "killed") == contents(uninterrupted)


def wait_for(folder: Path, process: "subprocess.Popen[bytes]") -> None:
    """Until a result has appeared in a folder."""
    for _ in range(6000):
        if folder.is_dir() and any(path.name[0] != "." for path in folder.iterdir()):
            return
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    raise AssertionError(f"nothing appeared in {folder}")


def wait_until_gone(processes: Sequence[int]) -> None:
    """Workers end with their parent."""
    for _ in range(600):
        if not any(psutil.pid_exists(pid) for pid in processes):
            return
        time.sleep(0.05)
    raise AssertionError("workers outlive their parent")


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    from megatron_7b.prepare.running.workspace import lock

    inputs, output = write_raw_files(tmp_path / "raw"), tmp_path / "clean"
    with lock(output / "work"), pytest.raises(ConfigError, match="another run is at work"):
        prepare(inputs, output)


def test_a_document_that_ends_workers_is_quarantined(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": prose(seed)}) for seed in range(3)))
    job = PrepareJob(inputs=find_inputs([str(path)]), output_folder=tmp_path, book=load_recipe([]))
    with Supervisor(1) as supervisor:
        plan = build_plan(job, supervisor, Silent())
    plan.documents[0].run(Heartbeat(skipped={f"{path}:2": "its worker hung"}))
    (quarantined,) = read_lines(plan.documents[0].folder / "quarantine.jsonl")
    assert (quarantined["position"], quarantined["reason"]) == (2, "its worker hung")
    (result,) = read_lines(plan.documents[0].folder / "result.json")
    assert [result["stages"][0][name] for name in ("documents_in", "kept", "quarantined")] == [3, 2, 1]


def test_a_stage_that_loses_a_document_is_a_defect() -> None:
    count = StageCount("step", documents_in=10, kept=7, removed=Counter({"step:a": 1, "step:b": 1}))
    with pytest.raises(AssertionError, match="10 in and 0 added, but 7 kept, 2 removed and 0 quarantined"):
        count.check()
    count.quarantined = 1
    count.check()
    assert StageCount.from_json(json.loads(json.dumps(count.to_json()))) == count
