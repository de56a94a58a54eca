"""The same tasks on a Ray cluster, by datatrove's executor: phase after phase, each waited for.

That executor ends as if all were well where a task has failed too often, so after each phase the results are looked
for. As with Slurm, which tasks are done is asked of their results alone.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import megatron_7b
from megatron_7b.errors import ConfigError, MegatronError
from megatron_7b.prepare.accounting import RunReport
from megatron_7b.prepare.extras import import_extra
from megatron_7b.prepare.running.phase import Phase
from megatron_7b.prepare.running.run import (
    PrepareJob,
    Progress,
    ResultTask,
    build_plan,
    check_job,
    find_finished,
    finish,
)
from megatron_7b.prepare.running.supervisor import ONE_THREAD, Supervisor
from megatron_7b.prepare.running.workspace import lock, remove_leftovers


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """What is asked of the cluster."""

    address: str
    """Of its head; `auto` for the one that this machine belongs to, `local` for one of this machine alone."""
    memory_gb: float = 4
    """For each task."""
    max_tasks: int | None = None
    """At once; None lets Ray decide."""


def run_on_ray(job: PrepareJob, options: RayOptions, progress: Progress) -> RunReport:
    """Run on a cluster; the output folder and the inputs must be on disks that all nodes share.

    Raises:
        MegatronError: As `run_prepare`; and where ray is not installed, or a task failed on every try.
    """
    import_extra("ray", "--ray-address", extra="ray")
    check_job(job)
    finished = find_finished(job)
    if finished is not None:
        return finished
    started = time.time()
    with lock(job.work_folder):
        remove_leftovers(job.work_folder)
        with Supervisor(job.num_workers, progress.warn) as supervisor:
            plan = build_plan(job, supervisor, progress)
        _connect(options.address)
        sizes = [task.shard.size for task in plan.documents]
        _run_phase("reading and filtering", plan.documents, sizes, job, options, progress)
        _run_phase("finding duplicates", [plan.duplicates], [sum(sizes)], job, options, progress)
        _run_phase("writing", plan.corpus, sizes, job, options, progress)
        return finish(job, plan, started)


def _connect(address: str) -> None:
    ray = import_extra("ray", "--ray-address", extra="ray")
    try:
        path = f"{Path(megatron_7b.__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}"
        environment = {"PYTHONPATH": path, **dict.fromkeys(ONE_THREAD, "1")}
        ray.init(address=address, log_to_driver=False, runtime_env={"env_vars": environment})
    except ConnectionError as error:
        raise ConfigError(f"no Ray cluster at {address}: {error}", hint="`ray start --head` begins one") from error


def _run_phase(
    name: str,
    tasks: Sequence[ResultTask],
    sizes: Sequence[int],
    job: PrepareJob,
    options: RayOptions,
    progress: Progress,
) -> None:
    executor_class = import_extra("datatrove.executor.ray", "--ray-address").RayPipelineExecutor
    import_extra("loguru", "--ray-address").logger.disable("datatrove")
    progress.begin(name, sum(sizes))
    waiting = [task for task in tasks if not task.folder.exists()]
    if waiting:
        logs = (job.work_folder / "ray" / f"{job.key}-{time.time_ns()}").resolve()
        executor_class(
            pipeline=[Phase(waiting, job.stall_seconds)],
            tasks=len(waiting),
            workers=-1 if options.max_tasks is None else options.max_tasks,
            mem_per_cpu_gb=options.memory_gb,
            skip_completed=False,
            logging_dir=str(logs),
        ).run()
        failed = [task.label for task in waiting if not task.folder.exists()]
        if failed:
            raise MegatronError(
                f"{len(failed)} of {len(waiting)} tasks failed on the Ray cluster, the first: {failed[0]}",
                hint=f"their logs are in {logs / 'logs'}; the same command continues where it stopped",
            )
    progress.advance(sum(sizes))
