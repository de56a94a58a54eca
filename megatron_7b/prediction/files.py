"""Predictions from file to file: in order, with progress, and continued where an interrupted run left off.

While predictions are being made they are in `OUTPUT.part`, a line for each line of the input; `OUTPUT` appears when all
are there.
"""

import errno
import hashlib
import json
import os
import select
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import batched, islice
from pathlib import Path
from typing import IO, Any

from megatron_7b.data.records.reading import RecordError, as_line, parse_record, read_records
from megatron_7b.errors import ConfigError, DataFormatError
from megatron_7b.files import flush_to_disk, replace_text
from megatron_7b.prediction.predicting import RECORDS_AT_ONCE, PredictionSetup, predict_batch

STREAM = "-"
KEY = "prediction"


@dataclass(frozen=True)
class PredictionProgress:
    """How far a run is.

    Attributes:
        done: Records with a prediction, those of an earlier run included.
        of_earlier_run: How many of them are.
        total: Records of the input; None if it is a stream.
    """

    done: int
    of_earlier_run: int
    total: int | None


@dataclass(frozen=True)
class PredictionJob:
    """An input and an output, checked.

    Attributes:
        source: A JSONL file, or `-`.
        target: Where the lines with predictions are put, or `-`.
        total: Records of the input; None if it is a stream.
        done: Records that an interrupted run has already made predictions for.
    """

    source: str
    target: str
    total: int | None
    done: int

    @property
    def part(self) -> Path:
        """The file that an output is made in."""
        return Path(f"{self.target}.part")


def plan_job(setup: PredictionSetup, source: str, target: str, *, overwrite: bool) -> PredictionJob:
    """Check the input line by line, and find what an interrupted run has left.

    Raises:
        ConfigError: The output exists, or its beginning was made from another input or with another checkpoint.
        DataFormatError: Lines cannot be used; all are named.
    """
    total = None
    if source != STREAM:

        def check(record: dict[str, Any]) -> None:
            setup.task.sequences(record)

        total = sum(1 for _ in read_records(Path(source), check, example='{"text": "How lovely!"}'))
    if target == STREAM:
        return PredictionJob(source, target, total, 0)
    job = PredictionJob(source, target, total, 0)
    if overwrite:
        job.part.unlink(missing_ok=True)
        _note_file(job).unlink(missing_ok=True)
    elif Path(target).exists():
        raise ConfigError(f"{target} exists already", hint="--overwrite replaces it")
    if not Path(target).absolute().parent.is_dir():
        raise ConfigError(f"{target} cannot be written: there is no folder {Path(target).parent}")
    return PredictionJob(source, target, total, _done_before(job, setup))


def run_job(
    job: PredictionJob,
    setup: PredictionSetup,
    *,
    fp32_on_cpu: bool = True,
    report: Callable[[PredictionProgress], None] | None = None,
) -> int:
    """Make the predictions of a job; the main rank reads and writes.

    Args:
        job: From `plan_job`.
        setup: The checkpoint.
        fp32_on_cpu: As for `opened_model`.
        report: Called after each batch, on the main rank.

    Returns:
        Records with a prediction.

    Collective: all ranks.

    Raises:
        DataFormatError: A line of a stream cannot be used; the lines before it have their predictions.
    """
    import torch.distributed as dist

    from megatron_7b.checkpoint.open_model import opened_model

    done = job.done
    with opened_model(setup.folder, setup.config, fp32_on_cpu=fp32_on_cpu) as model:
        is_main = model.layout.is_main
        batches = _batches(job, setup) if is_main else iter(())
        output = _open_output(job) if is_main else None
        while True:
            shared: list[Any] = [next(batches, ([], None))]  # what the other ranks have is replaced
            dist.broadcast_object_list(shared, src=0)
            batch, problem = shared[0]
            predictions = predict_batch(model, setup.task, batch) if batch else iter(())
            lines = [as_line({**record, KEY: one}) for record, one in zip(batch, predictions, strict=True)]
            if output is not None:
                _append(job, output, lines)
            done += len(batch)
            if problem is not None:
                raise DataFormatError(problem)
            if not batch:
                break
            if report is not None and is_main:
                report(PredictionProgress(done, job.done, job.total))
        if output is not None:
            _publish(job, output)
    return done


type _Batch = tuple[list[dict[str, Any]], str | None]
"""Records, and what is wrong with the line after them."""


def _batches(job: PredictionJob, setup: PredictionSetup) -> Iterator[_Batch]:
    """Yield the records that have no prediction yet; those of a stream as soon as no further line is waiting."""
    if job.source != STREAM:
        records = (record for _, record in read_records(Path(job.source), dict))
        for batch in batched(islice(records, job.done, None), RECORDS_AT_ONCE):
            yield list(batch), None
        return
    waiting: list[dict[str, Any]] = []
    count = 0
    for number, (line, has_more) in enumerate(_stream_lines(sys.stdin.fileno()), start=1):
        if line.strip():
            try:
                record = parse_record(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
                setup.task.sequences(record)
            except RecordError as error:
                yield waiting, f"line {number} of the input: {error}"
                return
            count += 1
            if count > job.done:
                waiting.append(record)
        if waiting and (len(waiting) == RECORDS_AT_ONCE or not has_more):
            yield waiting, None
            waiting = []
    if waiting:
        yield waiting, None


def _stream_lines(file: int) -> Iterator[tuple[bytes, bool]]:
    """Yield each line of a stream, and whether further ones are there without waiting."""
    rest = b""
    while chunk := os.read(file, 1 << 16):
        *lines, rest = (rest + chunk).split(b"\n")
        for number, line in enumerate(lines, start=1):
            yield line, number < len(lines) or bool(select.select([file], [], [], 0)[0])
    if rest:
        yield rest, False


def _open_output(job: PredictionJob) -> IO[str]:
    if job.target == STREAM:
        return sys.stdout
    return job.part.open("a", encoding="utf-8", newline="\n")


def _append(job: PredictionJob, output: IO[str], lines: list[str]) -> None:
    try:
        output.writelines(lines)
        output.flush()
    except OSError as error:  # of a file that the error does not name
        if job.target == STREAM:
            raise
        raise OSError(error.errno, os.strerror(error.errno or errno.ENOSPC), str(job.part)) from error


def _publish(job: PredictionJob, output: IO[str]) -> None:
    """Give a complete output its name."""
    if job.target == STREAM:
        return
    output.close()
    flush_to_disk(job.part)
    os.replace(job.part, job.target)
    _note_file(job).unlink(missing_ok=True)


def _note_file(job: PredictionJob) -> Path:
    return Path(f"{job.target}.part.json")


def _noted(job: PredictionJob) -> object:
    """Return what was noted when the file was begun; None if nothing can be read."""
    try:
        return json.loads(_note_file(job).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _done_before(job: PredictionJob, setup: PredictionSetup) -> int:
    """Return how many lines an interrupted run has made, after cutting off what it left incomplete.

    Raises:
        ConfigError: They were made from another input, or with another checkpoint.
    """
    digest = hashlib.sha256((setup.folder / "checkpoint.json").read_bytes()).hexdigest()
    data, task, dtype = setup.config.data, setup.config.finetune, setup.config.precision.params_dtype
    decided = [data.seq_length, task.doc_stride, task.may_lack_answer, dtype]
    note = {"checkpoint": str(setup.folder.resolve()), "manifest": digest, "options": decided}
    if not job.part.exists():
        replace_text(_note_file(job), json.dumps(note))
        return 0
    if _noted(job) != note:
        raise ConfigError(
            f"{job.part} was begun with another checkpoint than {setup.folder}, or with other options",
            hint="--overwrite begins it again",
        )
    content = job.part.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    if len(complete) < len(content):
        with job.part.open("r+b") as stream:
            stream.truncate(len(complete))
    lines = complete.splitlines()
    if lines and job.source != STREAM:
        _check_same_input(job, lines)
    return len(lines)


def _check_same_input(job: PredictionJob, lines: list[bytes]) -> None:
    records = (record for _, record in read_records(Path(job.source), dict))
    for number, line in enumerate(lines):
        record = next(records, None)
        made = json.loads(line)
        made.pop(KEY, None)
        if record is None or made != {key: value for key, value in record.items() if key != KEY}:
            raise ConfigError(
                f"line {number + 1} of {job.part} is not that of {job.source}", hint="--overwrite begins it again"
            )
