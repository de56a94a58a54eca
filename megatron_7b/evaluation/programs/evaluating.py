"""Programs that a checkpoint writes for problems, run against their tests in confined processes."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_7b.data.records.reading import as_line
from megatron_7b.errors import ConfigError
from megatron_7b.evaluation.programs.pass_at_k import estimate_pass_at_k
from megatron_7b.evaluation.programs.problems import Problem, read_problems
from megatron_7b.evaluation.report.statistics import interval
from megatron_7b.generation.options import GenerationOptions
from megatron_7b.generation.setup import GenerationSetup
from megatron_7b.runtime.confinement.running import Limits, Verdict, check_isolation, run_program
from megatron_7b.runtime.machine.device_facts import available_cores
from megatron_7b.runtime.output_paths import check_file_to_write
from megatron_7b.runtime.rescue import write_or_rescue

DEFAULT_MAX_NEW_TOKENS = 512
_BATCHES_PER_REPORT = 4
_SAMPLING = {"temperature": 0.8, "top_p": 0.95}
"""For several samples; those of the paper."""

type Progress = Callable[[str, int, int], None]
"""Takes what is being done, and how many of how many are done."""


@dataclass(frozen=True, kw_only=True)
class ProgramOptions:
    """How programs are written and judged.

    Attributes:
        pass_at: The k of pass@k.
        num_samples: Programs for each problem, at least the largest k; None: that many.
        temperature: Of their drawing; None: greedy for a single one, 0.8 for several.
        top_p: Of their drawing; None: 0.95, unless greedy.
        max_new_tokens: Longest program.
        seed: The same seed gives the same programs.
        batch_size: Programs that are written together.
        num_workers: Programs that are judged at once; None: one for each core.
        limits: What each may use.
        limit: Only so many problems.
    """

    pass_at: tuple[int, ...] = (1,)
    num_samples: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    seed: int = 1234
    batch_size: int = 16
    num_workers: int | None = None
    limits: Limits = dataclasses.field(default_factory=Limits)
    limit: int | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: One is out of range.
        """
        if not self.pass_at or min(self.pass_at) < 1:
            raise ConfigError(f"pass@k is asked for k of {list(self.pass_at)}, expected numbers of at least 1")
        if self.num_samples is not None and self.num_samples < max(self.pass_at):
            raise ConfigError(
                f"pass@{max(self.pass_at)} cannot be estimated from {self.num_samples} samples",
                hint=f"--num-samples {max(self.pass_at)} or more; twice as many give a steadier figure",
            )
        for name in ("max_new_tokens", "batch_size", "num_workers", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}, expected at least 1")
        if self.samples > 1 and self.temperature == 0:
            raise ConfigError(f"at temperature 0 all {self.samples} samples of a problem are the same")

    @property
    def samples(self) -> int:
        """Programs for each problem."""
        return self.num_samples or max(self.pass_at)

    def generation(self, stop: tuple[str, ...], sample: int) -> GenerationOptions:
        """Return how the sample of this number is written."""
        drawing = _SAMPLING if self.samples > 1 or self.temperature else {"temperature": 0.0}
        given = {name: value for name in ("temperature", "top_p") if (value := getattr(self, name)) is not None}
        return GenerationOptions(
            max_new_tokens=self.max_new_tokens, seed=self.seed + sample, stop=stop, **{**drawing, **given}
        )  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """A program, and how it did."""

    problem: Problem
    completion: str
    verdict: Verdict

    def record(self) -> dict[str, Any]:
        """Return it under the names of HumanEval's own files of samples and results."""
        return {"task_id": self.problem.task_id, "completion": self.completion, **dataclasses.asdict(self.verdict)}


@dataclass(frozen=True)
class ProgramResults:
    """What was found.

    Attributes:
        samples: All programs, problem by problem.
        pass_at: The k that were asked for.
        seconds_writing: Of the model.
        seconds_judging: Of the tests.
    """

    samples: tuple[Sample, ...]
    pass_at: tuple[int, ...]
    seconds_writing: float
    seconds_judging: float

    @property
    def counts(self) -> dict[str, tuple[int, int]]:
        """By problem: programs, and how many of them are right."""
        found: dict[str, tuple[int, int]] = {}
        for sample in self.samples:
            written, right = found.get(sample.problem.task_id, (0, 0))
            found[sample.problem.task_id] = written + 1, right + sample.verdict.passed
        return found

    def estimates(self, k: int) -> list[float]:
        """Return pass@k of each problem."""
        return [estimate_pass_at_k(written, right, k) for written, right in self.counts.values()]

    def value(self, k: int) -> float:
        """Return pass@k, 0 to 1: the mean over problems."""
        estimates = self.estimates(k)
        return sum(estimates) / len(estimates)

    def interval(self, k: int) -> tuple[float, float]:
        """Return where pass@k lies with 95 % confidence, problems resampled."""
        return interval(self.estimates(k))

    def measures(self) -> dict[str, float]:
        """Return all figures by name."""
        return {f"pass@{k}": self.value(k) for k in self.pass_at}


@dataclass(frozen=True)
class ProgramTask:
    """Problems that have been read, for a checkpoint."""

    setup: GenerationSetup
    problems: tuple[Problem, ...]
    options: ProgramOptions


def read_program_task(setup: GenerationSetup, file: Path, options: ProgramOptions) -> ProgramTask:
    """Read and check everything before a model is loaded; the arguments are those of `evaluate_programs`.

    Raises:
        ConfigError: An option is impossible, a problem does not fit the model, or programs cannot be isolated here.
        DataFormatError: A problem cannot be used.
    """
    problems = tuple(read_problems(file, options.limit))
    for problem in problems:
        setup.requests([setup.encode(problem.prompt)], options.generation(problem.stop, 0))
    check_isolation(options.limits)
    return ProgramTask(setup, problems, options)


def evaluate_programs(
    setup: GenerationSetup,
    file: Path,
    options: ProgramOptions | None = None,
    *,
    output: Path | None = None,
    fp32_on_cpu: bool = True,
    report: Progress | None = None,
) -> ProgramResults | None:
    """Have a checkpoint write programs, and run them against their tests.

    **This runs what a model has written.** Programs have no network, no files but the standard library's, no further
    processes, and limits of time and memory; see `runtime.confinement`.

    Args:
        setup: Of the checkpoint.
        file: Problems, as `problems.read_problems` takes them.
        options: How; None: pass@1 of greedy programs.
        output: File of samples to write.
        fp32_on_cpu: Compute in FP32 on a CPU, whatever the configuration says.
        report: Takes how far it is.

    Returns:
        What was found; None on ranks other than the main one.

    Collective: all ranks.

    Raises:
        ConfigError: As `read_program_task`, which comes first.
        DataFormatError: A problem cannot be used.
    """
    if output is not None:
        check_file_to_write(output, "the file of samples")
    task = read_program_task(setup, file, options or ProgramOptions())
    results = run_program_task(task, fp32_on_cpu=fp32_on_cpu, report=report)
    if results is not None and output is not None:
        write_samples(output, results)
    return results


def run_program_task(
    task: ProgramTask, *, fp32_on_cpu: bool = True, report: Progress | None = None
) -> ProgramResults | None:
    """Write the programs and judge them; see `evaluate_programs`. Collective: all ranks."""
    started = time.perf_counter()
    completions = _write(task, fp32_on_cpu=fp32_on_cpu, report=report or _tell_nobody)
    if completions is None:
        return None
    written = time.perf_counter()
    asked = [problem for problem in task.problems for _ in range(task.options.samples)]
    verdicts = judge_programs(
        [(problem, text) for problem, text in zip(asked, completions, strict=True)],
        task.options.limits, num_workers=task.options.num_workers, report=report or _tell_nobody,
    )  # fmt: skip
    samples = tuple(map(Sample, asked, completions, verdicts))
    return ProgramResults(samples, task.options.pass_at, written - started, time.perf_counter() - written)


def judge_programs(
    completions: Sequence[tuple[Problem, str]],
    limits: Limits,
    *,
    num_workers: int | None = None,
    report: Progress | None = None,
) -> list[Verdict]:
    """Run programs against their tests, several at a time; the same program of a problem only once.

    Raises:
        ConfigError: They cannot be isolated here.
    """
    distinct = list({(problem.task_id, text): (problem, text) for problem, text in completions}.values())
    found: dict[tuple[str, str], Verdict] = {}

    def judge(one: tuple[Problem, str]) -> Verdict:
        problem, text = one
        return run_program(problem.program(text), problem.tests, limits)

    with ThreadPoolExecutor(num_workers or available_cores()) as pool:
        try:
            for (problem, text), verdict in zip(distinct, pool.map(judge, distinct), strict=True):
                found[problem.task_id, text] = verdict
                (report or _tell_nobody)("programs judged", len(found), len(distinct))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [found[problem.task_id, text] for problem, text in completions]


def write_samples(file: Path, results: ProgramResults) -> None:
    """Write all programs with their verdicts as JSON lines; raises as `write_or_rescue`."""
    write_or_rescue(file, lambda stream: stream.writelines(as_line(sample.record()) for sample in results.samples))


def _write(task: ProgramTask, *, fp32_on_cpu: bool, report: Progress) -> list[str] | None:
    """Return the completions, `options.samples` for each problem in turn. Collective: all ranks."""
    from megatron_7b.generation.copies import Copies
    from megatron_7b.generation.session import Session

    options = task.options
    wanted = [
        (task.setup.encode(problem.prompt), options.generation(problem.stop, sample))
        for problem in task.problems
        for sample in range(options.samples)
    ]
    completions: list[str] = []
    with Session(
        task.setup, fp32_on_cpu=fp32_on_cpu, max_batch_size=options.batch_size, several_copies=True
    ) as session:
        copies = Copies(session)
        if not session.is_main:
            copies.follow()
            return None
        at_once = _BATCHES_PER_REPORT * options.batch_size * session.layout.dp_size
        with copies.led():
            for first in range(0, len(wanted), at_once):
                prompts, how = zip(*wanted[first : first + at_once], strict=True)
                completions += [text.text for text in copies.generate(prompts, how)]
                report("programs written", len(completions), len(wanted))
    return completions


def _tell_nobody(what: str, done: int, total: int) -> None:
    pass
