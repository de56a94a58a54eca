"""A whole run: plan, three phases over worker processes, the account, and the result in its place."""

import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import orjson

from megatron_7b import __version__
from megatron_7b.errors import ConfigError, DataFormatError
from megatron_7b.files import flush_tree_to_disk
from megatron_7b.prepare.accounting import Distributions, RunReport, Sample, StageCount, merge_stages
from megatron_7b.prepare.augmentation.step import check_augmentation
from megatron_7b.prepare.duplicates.near import check_duplicates
from megatron_7b.prepare.extras import import_extra
from megatron_7b.prepare.reading.inputs import Inputs, check_per_source, plan_shards
from megatron_7b.prepare.recipe import Recipe, RecipeBook, book_to_dict
from megatron_7b.prepare.report.page import write_report
from megatron_7b.prepare.rules.decontamination import check_decontamination
from megatron_7b.prepare.rules.language import check_language
from megatron_7b.prepare.running import corpus_task, document_task, duplicate_task
from megatron_7b.prepare.running.corpus_task import CorpusTask
from megatron_7b.prepare.running.document_task import DocumentTask
from megatron_7b.prepare.running.duplicate_task import DuplicateTask
from megatron_7b.prepare.running.steps import find_step_names
from megatron_7b.prepare.running.supervisor import STALL_SECONDS, Supervisor, Task
from megatron_7b.prepare.running.unpack_task import plan_unpacking
from megatron_7b.prepare.running.workspace import (
    describe_sections,
    hash_of,
    hash_versions,
    lock,
    read_lines,
    remove_leftovers,
    write_lines,
)

SAMPLES_PER_REASON = 50
_PUBLISHED = ("train", "validation", "test", "dropped", "quarantine.jsonl", "report.html", "report.json")
"""In the order in which they take their places; report.json says that the others have."""


@dataclass(frozen=True, kw_only=True)
class PrepareJob:
    """What a user asked for."""

    inputs: Inputs
    output_folder: Path
    book: RecipeBook
    num_workers: int = 1
    stall_seconds: float = STALL_SECONDS
    """A worker that makes no progress for this long is ended; a document at which two ended is quarantined."""
    overwrite: bool = False
    """Replace the result of another recipe or other inputs."""
    keep_work: bool = False
    """Keep the results on the way, so that a file that is added later costs only itself."""
    command: Sequence[str] = ()

    @property
    def work_folder(self) -> Path:
        """Folder of intermediate results."""
        return self.output_folder / "work"

    @cached_property
    def key(self) -> str:
        """Of the recipe, the inputs and the versions."""
        sections = [describe_sections(recipe, list(Recipe.__dataclass_fields__)) for recipe in recipes_of(self.book)]
        return hash_of("run", hash_versions(), sections, book_to_dict(self.book), self.inputs.files)


class Progress(Protocol):
    """Told how far a run is."""

    def begin(self, phase: str, total: int) -> None:
        """Begin a phase with `total` bytes of input."""

    def advance(self, size: int) -> None:
        """Count `size` more of them as done."""

    def warn(self, message: str) -> None:
        """Tell that something was given up; the run continues."""


class ResultTask(Task, Protocol):
    """A task that is done once its folder is there."""

    @property
    def folder(self) -> Path:
        """Where the result appears."""


@dataclass
class Plan:
    """The tasks of the three phases; each needs the results of the phase before."""

    documents: list[DocumentTask]
    duplicates: DuplicateTask
    corpus: list[CorpusTask]


def run_prepare(job: PrepareJob, progress: Progress) -> RunReport:
    """Make the corpus, or continue it, or find it finished.

    Raises:
        MegatronError: A mistake that the user can fix; only intermediate results have been written.
        AssertionError: Documents were lost: a defect.
    """
    started = time.time()
    check_job(job)
    finished = find_finished(job)
    if finished is not None:
        return finished
    with lock(job.work_folder):
        remove_leftovers(job.work_folder)
        with Supervisor(job.num_workers, progress.warn, job.stall_seconds) as supervisor:
            plan = build_plan(job, supervisor, progress)
            _execute(plan, supervisor, progress)
        return finish(job, plan, started)


def check_job(job: PrepareJob) -> None:
    """Refuse all that can be known to be wrong before the first byte is read.

    Raises:
        MegatronError: What is missing or impossible.
    """
    recipes = recipes_of(job.book)
    if job.num_workers < 1:
        raise ConfigError(f"--workers {job.num_workers}: expected at least 1")
    if job.stall_seconds <= 0:
        raise ConfigError(f"--stall-seconds {job.stall_seconds:g}: expected more than 0")
    for recipe in recipes:
        check_language(recipe.language)
    find_step_names(recipes)
    _check_formats(job)
    check_per_source(job.inputs.files, job.book)
    check_duplicates(job.book.recipe.duplicates)
    check_decontamination(job.book.recipe.decontamination)
    check_augmentation(job.book.recipe.augmentation)
    output = job.output_folder.resolve()
    inside = [file.path for file in job.inputs.files if output in Path(file.path).resolve().parents]
    if inside:
        raise ConfigError(f"input {inside[0]} is in the output folder {job.output_folder}")


def _check_formats(job: PrepareJob) -> None:
    """Ask for what reads the formats at hand."""
    formats = {file.format for file in job.inputs.files}
    if formats & {"html", "warc"} or any(recipe.reading.html_key for recipe in recipes_of(job.book)):
        import_extra("resiliparse.extract.html2text", "reading html")
        import_extra("resiliparse.parse.encoding", "reading html")
    if "warc" in formats:
        import_extra("fastwarc.warc", "reading WARC files")


def recipes_of(book: RecipeBook) -> list[Recipe]:
    """Return every recipe that some file may have."""
    return [book.recipe, *(recipe for _, recipe in book.per_source)]


def finish(job: PrepareJob, plan: Plan, started: float) -> RunReport:
    """Add up what all tasks have done, and put the result in its place.

    Args:
        job: What was asked for.
        plan: Its tasks, all of them done.
        started: Time of the beginning, in seconds since the epoch.

    Raises:
        DataFormatError: No document is left.
        AssertionError: Documents were lost: a defect.
    """
    report = _add_up(job, plan, time.time() - started)
    _publish(job, plan, report)
    if not job.keep_work:
        shutil.rmtree(job.work_folder)
    return report


def find_finished(job: PrepareJob) -> RunReport | None:
    """Return the report of a run that was the same and has finished.

    Raises:
        ConfigError: The folder holds the result of another run, or files of somebody else's.
    """
    folder = job.output_folder
    there = [name for name in _PUBLISHED if (folder / name).exists()]
    if not there:
        return None
    path = folder / "report.json"
    report = RunReport.from_json(orjson.loads(path.read_bytes())) if path.exists() else None
    if report is not None and report.key == job.key:
        return report
    # A run that was stopped while its results took their places left no report, but its work.
    if not job.overwrite and (report is not None or not (folder / "work").exists()):
        what = "the result of another recipe or other inputs" if report else f"files of another origin ({there[0]})"
        raise ConfigError(f"{folder} holds {what}", hint="another --output-dir, or --overwrite to replace it")
    return None


def build_plan(job: PrepareJob, supervisor: Supervisor, progress: Progress) -> Plan:
    """Return all tasks of a run; unpacks what cannot be cut before."""
    unpacking = plan_unpacking(job.inputs.files, job.book, job.work_folder)
    if unpacking:
        _run_phase("unpacking", unpacking, [task.file.size for task in unpacking], supervisor, progress)
    shards = plan_shards(job.inputs.files, job.book, {task.file.path: task.pieces() for task in unpacking})
    names = tuple(find_step_names(recipes_of(job.book)))
    documents = [DocumentTask(shard, names, job.work_folder / "documents") for shard in shards]
    duplicates = DuplicateTask(tuple(documents), job.work_folder / "duplicates")
    corpus = [CorpusTask(task, duplicates, number, job.work_folder / "corpus") for number, task in enumerate(documents)]
    return Plan(documents, duplicates, corpus)


def _execute(plan: Plan, supervisor: Supervisor, progress: Progress) -> None:
    """Run what is not done yet."""
    sizes = [task.shard.size for task in plan.documents]
    _run_phase("reading and filtering", plan.documents, sizes, supervisor, progress)
    _run_phase("finding duplicates", [plan.duplicates], [sum(sizes)], supervisor, progress)
    _run_phase("writing", plan.corpus, sizes, supervisor, progress)


def _run_phase(
    name: str,
    tasks: Sequence[ResultTask],
    sizes: Sequence[int],
    supervisor: Supervisor,
    progress: Progress,
) -> None:
    progress.begin(name, sum(sizes))
    waiting = [index for index, task in enumerate(tasks) if not task.folder.exists()]
    progress.advance(sum(sizes) - sum(sizes[index] for index in waiting))
    supervisor.run([tasks[index] for index in waiting], lambda done: progress.advance(sizes[waiting[done]]))


def _add_up(job: PrepareJob, plan: Plan, seconds: float) -> RunReport:
    """Return the account of all shards, checked."""
    firsts = [_result(task.folder / document_task.RESULT) for task in plan.documents]
    lasts = [_result(task.folder / corpus_task.RESULT) for task in plan.corpus]
    found = _result(plan.duplicates.folder / duplicate_task.RESULT)
    distributions = Distributions()
    for result in (*firsts, *lasts):
        distributions.merge(Distributions.from_json(result["distributions"]))
    stages = [*_merge(firsts), *_merge(lasts)]
    by_name = {stage.name: stage for stage in stages}
    for name, facts in found.items():
        stage = by_name[f"{name}_duplicates"]
        stage.seconds += facts["seconds"] + sum(result["sign_seconds"][name] for result in firsts)
        stage.peak_memory = max(stage.peak_memory, facts["memory"])
        distributions.duplicate_groups[name] = Counter({int(size): number for size, number in facts["groups"].items()})
    report = RunReport(
        version=__version__,
        command=list(job.command),
        recipe=book_to_dict(job.book),
        inputs=[{"path": file.path, "bytes": file.size} for file in job.inputs.files],
        stages=stages,
        distributions=distributions,
        wall_seconds=seconds,
        workers=job.num_workers,
        key=job.key,
    )
    report.check()
    written = sum(counts["documents"] for counts in distributions.splits.values())
    if written != stages[-1].kept:
        raise AssertionError(f"{stages[-1].kept} documents left the last stage, {written} were written")
    if not written:
        raise DataFormatError(
            _explain_nothing(stages), hint=f"samples of what was dropped are in {_keep_samples(plan)}"
        )
    return report


def _merge(results: Iterable[dict[str, Any]]) -> list[StageCount]:
    return merge_stages([StageCount.from_json(stage) for stage in result["stages"]] for result in results)


def _explain_nothing(stages: Sequence[StageCount]) -> str:
    if not stages[0].documents_in:
        return "the inputs hold no document"
    lines = [f"  {number:,} {reason}" for stage in stages for reason, number in stage.removed.most_common() if number]
    return f"no document is left of {stages[0].documents_in:,}:\n" + "\n".join(lines)


def _keep_samples(plan: Plan) -> Path:
    folder = plan.duplicates.results.parent / "dropped"
    folder.mkdir(exist_ok=True)
    for stage, samples in _gather_samples(plan).items():
        write_lines(folder / f"{stage}.jsonl", samples)
    return folder


def _gather_samples(plan: Plan) -> dict[str, list[Sample]]:
    """Return the samples of all shards by stage, the first few of each reason."""
    gathered: dict[str, list[Sample]] = {}
    counts: Counter[str] = Counter()
    folders = [task.folder for task in plan.documents] + [task.folder for task in plan.corpus]
    for folder in folders:
        for line in read_lines(folder / document_task.SAMPLES):
            sample = Sample(**line)
            counts[sample.reason] += 1
            if counts[sample.reason] <= SAMPLES_PER_REASON:
                gathered.setdefault(sample.stage, []).append(sample)
    return gathered


def _publish(job: PrepareJob, plan: Plan, report: RunReport) -> None:
    """Put everything together beside, then rename it into its place, the report last."""
    final = job.work_folder / "final"
    shutil.rmtree(final, ignore_errors=True)
    (final / "dropped").mkdir(parents=True)
    for task in plan.corpus:
        for split in corpus_task.SPLITS:
            source = task.folder / f"{split}{task.suffix}"
            if source.exists():
                (final / split).mkdir(exist_ok=True)
                _link(source, final / split / f"{task.number:05d}{task.suffix}")
    samples = _gather_samples(plan)
    for stage, of_stage in samples.items():
        write_lines(final / "dropped" / f"{stage}.jsonl", of_stage)
    quarantined = (line for task in plan.documents for line in read_lines(task.folder / document_task.QUARANTINE))
    write_lines(final / "quarantine.jsonl", quarantined)
    write_report(report, samples, final / "report.html")
    (final / "report.json").write_bytes(orjson.dumps(report.to_json(), option=_READABLE))
    flush_tree_to_disk(final)
    (job.output_folder / "report.json").unlink(missing_ok=True)
    for name in _PUBLISHED:
        target = job.output_folder / name
        shutil.rmtree(target, ignore_errors=True)
        if (final / name).exists():
            os.replace(final / name, target)
        else:
            target.unlink(missing_ok=True)


_READABLE = orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it if the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _result(path: Path) -> dict[str, Any]:
    return dict(next(iter(read_lines(path))))
