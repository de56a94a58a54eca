"""A run is measured on tasks as it trains: by the engine that generates, on the very weights that are trained.

The engine needs torch-native layers, without sequence or context parallelism. So a second model is built beside that
of the run, with the same tensor and pipeline parallelism, whose parameters are the run's own: it takes no memory of its
own but for the caches, which are there only while tasks are measured. Context-parallel ranks are copies for it.
"""

import contextlib
import dataclasses
import logging
import random
import time
from collections.abc import Iterator, Sequence
from typing import override

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_7b.adapter.quantized import QuantizedWeight
from megatron_7b.config.schema import RunConfig
from megatron_7b.evaluation.harness.results import TaskResults
from megatron_7b.evaluation.harness.running import run_tasks
from megatron_7b.generation.copies import Copies
from megatron_7b.generation.session import Session
from megatron_7b.generation.settings import read_generation_settings
from megatron_7b.generation.setup import GenerationSetup
from megatron_7b.model.builder import build_model, named_canonical_parameters
from megatron_7b.model.on_ranks import ModelOnRanks
from megatron_7b.optim.optimizer import gather_parameters
from megatron_7b.parallel import build_layout
from megatron_7b.parallel.groups import process_groups
from megatron_7b.runtime.process.signals import StopReason
from megatron_7b.training.hooks import Hook
from megatron_7b.training.metrics import StepMetrics, TaskMetrics
from megatron_7b.training.run import Run, Stopwatch
from megatron_7b.training.run_tasks import OF_TASKS, RunTasks

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 30.0


class _StopAskedForError(Exception):
    """Ends a measurement without a result, because the run is to stop."""


class TaskEvaluation(Hook):
    """Measures tasks at an interval and at the end.

    Args:
        tasks: Which, with their data.
        listeners: Their `after_tasks` is called.
    """

    def __init__(self, tasks: RunTasks, listeners: Sequence[Hook]) -> None:
        self._tasks, self._listeners = tasks, listeners

    @override
    def on_start(self, run: Run) -> None:
        """Build what measures, and do what the last start has left: it stopped right after a step that was due."""
        with keeping_random_states():
            self._model = build_beside_run(run.learner.on_ranks)
        if run.step > run.evaluated_step and self._is_due(run):
            self._measure(run)

    @override
    def after_step(self, run: Run, metrics: StepMetrics) -> None:
        if not run.must_stop and self._is_due(run):
            self._measure(run)

    def _is_due(self, run: Run) -> bool:
        return run.is_time(run.config.telemetry.eval_tasks_interval_steps)

    def _measure(self, run: Run) -> None:
        """Measure and report; a request to stop ends it without a result. Collective: all ranks."""
        with run.learner.clock.between_steps("evaluating"):
            self._measure_and_report(run)

    def _measure_and_report(self, run: Run) -> None:
        watch = Stopwatch()
        gather_parameters(run.learner.model)
        point_at(run.learner.on_ranks, self._model)
        with keeping_random_states():
            results = self._results(run)
        figures = run.ranks.from_main(None if results is None else _figures(results))
        run.agree_on_stop()
        if figures is None:
            return
        run.evaluated_step = run.step
        metrics = TaskMetrics(
            step=run.step,
            consumed_samples=run.counters.consumed_samples,
            consumed_tokens=run.counters.consumed_tokens,
            evaluation_seconds=watch.seconds,
            extra=figures,
        )
        for hook in self._listeners:
            hook.after_tasks(run, metrics)

    def _results(self, run: Run) -> TaskResults | None:
        """Return the results on the main rank, unless the run is to stop. Collective: all ranks."""
        setup = GenerationSetup(
            run.folder.root,
            self._model.config,
            self._tasks.tokenizer,
            read_generation_settings(run.companions.hugging_face),
        )
        batch_size, failure, results = self._tasks.options.batch_size, None, None
        with Session(setup, max_batch_size=batch_size, several_copies=True, model=self._model) as session:
            copies = Copies(session)
            if not session.is_main:
                copies.follow()
            else:
                assert self._tasks.loaded is not None
                try:
                    with copies.led():
                        results = run_tasks(
                            copies,
                            self._tasks.loaded,
                            self._tasks.options,
                            _Progress(run),
                            at_once=batch_size * session.layout.dp_size,  # a stop request waits for no more
                        )
                except _StopAskedForError:
                    pass
                except Exception as error:
                    if copies.has_failed:  # the others are in the midst of the work, and learn nothing from us
                        raise
                    failure = error
        with run.ranks.together(f"measuring tasks at step {run.step}"):
            if failure is not None:
                raise failure
        return results


class _Progress:
    """Says from time to time how far a measurement is, and ends it if the run is to stop; on the main rank."""

    def __init__(self, run: Run) -> None:
        self._run, self._last = run, time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._run.stop_request.reason is not StopReason.NONE:
            raise _StopAskedForError
        if time.monotonic() - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            logger.info("tasks at step %d: %d of %d requests %s", self._run.step, done, total, what)


def evaluated_config(config: RunConfig) -> RunConfig:
    """Return how the model of a run is built for measuring it."""
    parallel = dataclasses.replace(
        config.parallel, sequence_parallel=False, context_parallel_size=1, use_distributed_optimizer=False
    )
    model = dataclasses.replace(config.model, transformer_impl="local")
    precision = dataclasses.replace(config.precision, fp8="none", fp8_param_gather=False)
    runtime = dataclasses.replace(config.runtime, cuda_graph_impl="none", cross_entropy_impl="auto")
    return dataclasses.replace(config, parallel=parallel, model=model, precision=precision, runtime=runtime)


def build_beside_run(trained: ModelOnRanks) -> ModelOnRanks:
    """Build a model for inference beside that of a run, its parameters undefined until `point_at`.

    Collective: as `build_model`.
    """
    config = evaluated_config(trained.config)
    layout = build_layout(config.parallel, world_size=trained.layout.world_size, rank=trained.layout.rank)
    assert config.model.vocab_size is not None
    chunks = build_model(
        config,
        vocab_size=config.model.vocab_size,
        layout=layout,
        groups=process_groups(),
        device_type=trained.device_type,
        initialize=False,
        adapter=trained.adapter,
    )
    for chunk in chunks:
        chunk.eval().requires_grad_(False)
    beside = ModelOnRanks(config, layout, trained.device_type, chunks, trained.adapter)
    point_at(trained, beside)  # now: what was allocated for the parameters is given back before training begins
    return beside


@torch.no_grad()
def point_at(trained: ModelOnRanks, beside: ModelOnRanks) -> None:
    """Have the parameters of one model be those of another, whichever layers it is built from. Collective: none."""
    parameters = dict(named_canonical_parameters(trained.chunks))
    for name, parameter in named_canonical_parameters(beside.chunks):
        parameter.data = parameters[name].detach().to(parameter.dtype)  # itself, unless it is in FP8
    modules = {name: module for chunk in trained.chunks for name, module in chunk.named_modules()}
    for chunk in beside.chunks:
        for name, module in chunk.named_modules():
            if isinstance(module, QuantizedWeight):
                module.quantized = modules[name].quantized


def _figures(results: TaskResults) -> dict[str, float]:
    """Return figures and standard errors under the names that they have in metrics.jsonl."""
    found: dict[str, float] = {}
    for measure in results.measures():
        found[f"{OF_TASKS}{measure.path}"] = measure.value
        if measure.error is not None:
            found[f"{OF_TASKS}{measure.path}_stderr"] = measure.error
    return found


@contextlib.contextmanager
def keeping_random_states() -> Iterator[None]:
    """Leave all random states as they are: the harness seeds them, and training must not notice."""
    tracker = get_cuda_rng_tracker()
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (what the harness seeds)
    of_cpu, of_device = torch.get_rng_state(), torch.cuda.get_rng_state()
    of_tracker = {name: _bits(state) for name, state in tracker.get_states().items()}
    try:
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002
        torch.set_rng_state(of_cpu)
        torch.cuda.set_rng_state(of_device)
        tracker.set_states({name: _restored(state, of_tracker[name]) for name, state in tracker.get_states().items()})


def _bits(state: torch.Tensor | torch.Generator) -> torch.Tensor:
    return state.get_state() if isinstance(state, torch.Generator) else state


def _restored(state: torch.Tensor | torch.Generator, bits: torch.Tensor) -> torch.Tensor | torch.Generator:
    if not isinstance(state, torch.Generator):
        return bits
    state.set_state(bits)  # what CUDA graphs draw from stays the very object
    return state
