"""The same tasks as Slurm jobs, by datatrove's executor: an array per phase, one after another, then the finish.

Which tasks are done is asked of their results, as in a local run, and never of datatrove's own marks: those know
nothing of a recipe that has changed or a file that was added.
"""

import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megatron_7b
from megatron_7b.errors import ConfigError, MegatronError
from megatron_7b.prepare.extras import import_extra
from megatron_7b.prepare.running.heartbeat import Heartbeat
from megatron_7b.prepare.running.phase import Phase
from megatron_7b.prepare.running.run import Plan, PrepareJob, Progress, build_plan, check_job, find_finished, finish
from megatron_7b.prepare.running.supervisor import Supervisor, Task
from megatron_7b.prepare.running.workspace import lock, remove_leftovers

_ONE_THREAD = "export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 RAYON_NUM_THREADS=1"


@dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """What is asked of the cluster, for each task."""

    partition: str
    time_limit: str = "24:00:00"
    memory_gb: int = 4
    """0 takes what the cluster gives."""
    max_jobs: int | None = None
    """At once; None lets Slurm decide."""
    account: str | None = None


def submit_prepare(job: PrepareJob, options: SlurmOptions, progress: Progress) -> list[int] | None:
    """Submit a run, after unpacking here what cannot be cut otherwise.

    The output folder and the inputs must be on disks that all nodes share.

    Returns:
        Ids of the jobs, one per phase; the last one writes the report. None where the same run has finished.

    Raises:
        MegatronError: As `run_prepare`; and where datatrove is not installed or Slurm refuses.
    """
    check_job(job)
    if find_finished(job) is not None:
        return None
    with lock(job.work_folder):
        remove_leftovers(job.work_folder)
        with Supervisor(min(job.num_workers, len(os.sched_getaffinity(0))), progress.warn) as supervisor:
            plan = build_plan(job, supervisor, progress)
        phases: list[tuple[str, Sequence[Task]]] = [
            ("documents", plan.documents),
            ("duplicates", [plan.duplicates]),
            ("corpus", plan.corpus),
            ("finish", [_Finish(job, plan, time.time())]),
        ]
        return _submit(job, options, phases)


@dataclass(frozen=True)
class _Finish:
    """The account and the publication, as a task of their own."""

    job: PrepareJob
    plan: Plan
    started: float

    @property
    def label(self) -> str:
        return "finishing"

    def run(self, heartbeat: Heartbeat) -> None:  # noqa: ARG002  # minutes at most
        with lock(self.job.work_folder):
            finish(self.job, self.plan, self.started)


def _submit(job: PrepareJob, options: SlurmOptions, phases: Sequence[tuple[str, Sequence[Task]]]) -> list[int]:
    executor_class = import_extra("datatrove.executor.slurm", "--slurm-partition").SlurmPipelineExecutor
    import_extra("loguru", "--slurm-partition").logger.disable("datatrove")
    logs = (job.work_folder / "slurm" / f"{job.key}-{time.time_ns()}").resolve()
    executors: list[Any] = []
    for name, tasks in phases:
        executor = executor_class(
            pipeline=[Phase(tasks, job.stall_seconds)],
            tasks=len(tasks),
            workers=-1 if options.max_jobs is None else options.max_jobs,
            time=options.time_limit,
            partition=options.partition,
            mem_per_cpu_gb=options.memory_gb,
            job_name=f"prepare-{name}",
            qos=None,  # its default is a quality of service that most clusters do not have
            env_command=_environment(),
            sbatch_args={
                "kill-on-invalid-dep": "yes",  # else jobs whose predecessor failed wait for ever
                **({"account": options.account} if options.account else {}),
            },
            skip_completed=False,
            logging_dir=str(logs / name),
            depends=executors[-1] if executors else None,
        )
        executor.launch_merge_stats = _merge_no_statistics
        executors.append(executor)
    try:
        executors[-1].run()  # submits those that it depends on first
    except FileNotFoundError as error:
        raise ConfigError("no sbatch command here", hint="submit from a node of the cluster") from error
    except Exception as error:
        if type(error).__name__ != "CalledProcessError":
            raise
        raise MegatronError(f"Slurm refused a job: {error}", hint=f"the scripts are in {logs}") from error
    return [int(executor.job_id) for executor in executors]


def _merge_no_statistics() -> None:
    """In place of a further job per phase, which adds up statistics that nobody reads: the report has ours."""


def _environment() -> str:
    """Shell lines by which a job finds this interpreter and this project, installed or not."""
    binaries, project = Path(sys.executable).parent, Path(megatron_7b.__file__).parents[1]
    return "\n".join(
        [
            f"export PATH={shlex.quote(str(binaries))}:$PATH",
            f"export PYTHONPATH={shlex.quote(str(project))}${{PYTHONPATH:+:$PYTHONPATH}}",
            _ONE_THREAD,
        ]
    )
