"""A checkpoint, some tasks, their figures: `megatron-7b evaluate --tasks`."""

import contextlib
import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_7b import __version__
from megatron_7b.errors import ConfigError
from megatron_7b.evaluation.harness.results import TaskResults
from megatron_7b.generation.session import Session
from megatron_7b.generation.setup import GenerationSetup

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from megatron_7b.generation.copies import Copies

type Report = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class HarnessOptions:
    """Which tasks, and how.

    Attributes:
        tasks: Names of tasks, groups or tags, or paths of YAML files.
        include_path: Folders with tasks of one's own.
        task_data: Folder with data sets, see `harness.tasks`; None: they are on this machine already.
        allow_download: Whether data sets may be fetched from the hub.
        num_fewshot: Examples before each question; None: as the task says.
        limit: Questions of each task; None: all.
        apply_chat_template: Put questions into the tokenizer's chat template.
        system_instruction: System message.
        gen_kwargs: Over those of tasks that generate.
        log_samples: Keep every question with its answers.
        batch_size: Texts that share a forward pass.
        seed: Of the choice of examples, and of the resampling that standard errors come from.
    """

    tasks: tuple[str, ...]
    include_path: tuple[Path, ...] = ()
    task_data: Path | None = None
    allow_download: bool = False
    num_fewshot: int | None = None
    limit: int | None = None
    apply_chat_template: bool = False
    system_instruction: str | None = None
    gen_kwargs: str | None = None
    log_samples: bool = False
    batch_size: int = 16
    seed: int = 1234

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: One is out of range.
        """
        if not self.tasks:
            raise ConfigError("no task is named", hint="--tasks hellaswag,arc_easy")
        lowest = {"num_fewshot": 0, "limit": 1, "batch_size": 1}
        for name, least in lowest.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}, expected at least {least}")
        for one in (self.gen_kwargs or "").split(","):
            if one and not all(one.partition("=")):
                raise ConfigError(
                    f"gen_kwargs has {one!r}, expected NAME=VALUE", hint="--gen-kwargs max_gen_toks=64,temperature=0.7"
                )


def check_harness() -> None:
    """Refuse to go on without lm-evaluation-harness.

    Raises:
        ConfigError: It is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("tasks need lm-evaluation-harness", hint="pip install 'megatron_7b[harness]'")


def evaluate_tasks(
    setup: GenerationSetup, options: HarnessOptions, *, fp32_on_cpu: bool = True, report: Report | None = None
) -> TaskResults | None:
    """Measure a checkpoint on tasks.

    Args:
        setup: The checkpoint, from `generation.setup.read_setup`.
        options: Which tasks, and how.
        fp32_on_cpu: Compute in FP32 on a CPU, whatever the configuration says.
        report: Takes what is being done, requests done and requests in all; called on the main rank.

    Returns:
        The results on the main rank, None on the others.

    Collective: all ranks.

    Raises:
        ConfigError: The harness is not installed, a task is unknown or does not fit, or its data are not on this
            machine.
    """
    check_harness()
    tasks = load_tasks(options) if os.environ.get("RANK", "0") == "0" else None
    from megatron_7b.generation.copies import Copies

    with Session(setup, fp32_on_cpu=fp32_on_cpu, max_batch_size=options.batch_size, several_copies=True) as session:
        copies = Copies(session)
        if not session.is_main:
            copies.follow()
            return None
        assert tasks is not None
        with copies.led():
            return run_tasks(copies, tasks, options, report or (lambda *_: None))


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks with their data, and the index that they were found in."""

    loaded: list[Any]
    manager: "TaskManager"

    def check_lengths(self, context: int, new_tokens: int | None = None) -> None:
        """Refuse tasks whose answers are longer than a model's context.

        Args:
            context: Tokens of the longest text.
            new_tokens: What the options ask for in place of what the tasks do.

        Raises:
            ConfigError: There is one.
        """
        from megatron_7b.evaluation.harness.language_model import DEFAULT_NEW_TOKENS

        for task in self.tasks():
            if task.OUTPUT_TYPE != "generate_until":
                continue
            kwargs = task.config.generation_kwargs or {}
            wanted = new_tokens or int(kwargs.get("max_gen_toks") or DEFAULT_NEW_TOKENS)
            if wanted >= context:
                raise ConfigError(
                    f"task {task.task_name} asks for texts of {wanted} tokens, but the model's context is {context}",
                    hint="generation_kwargs: {max_gen_toks: N} in its YAML file asks for fewer; so does `evaluate "
                    "--gen-kwargs max_gen_toks=N`",
                )

    def tasks(self) -> list[Any]:
        """Return all tasks, those of groups included."""
        return [
            task for one in self.loaded for task in (one.get_all_tasks() if hasattr(one, "get_all_tasks") else [one])
        ]

    def directions(self) -> dict[str, bool]:
        """Return the measures, as `Measure.path` names them, and whether a larger figure is the better one.

        A group has those of its aggregate; a measure of which the harness does not know which way is better is left
        out.
        """
        found: dict[str, bool] = {}
        for one in self.loaded:
            members = one.get_all_tasks() if hasattr(one, "get_all_tasks") else [one]
            for task in members:
                found |= _directions(task)
            for group in [one, *one.get_all_groups()] if members != [one] else []:
                measured = {entry.metric for entry in group.aggregate_metric_list or ()}
                for path, larger in [entry for task in members for entry in _directions(task).items()]:
                    _, measure, *rest = path.split("/")
                    if measure in measured:
                        found["/".join([group.name, measure, *rest])] = larger
        return found


def _directions(task: Any) -> dict[str, bool]:
    filters = [one.name for one in getattr(task, "_filters", ())] or ["none"]
    return {
        "/".join([task.task_name, measure, *([] if name == "none" else [name])]): larger
        for measure, larger in task.higher_is_better().items()
        if larger is not None
        for name in filters
    }


def load_tasks(options: HarnessOptions) -> LoadedTasks:
    """Find tasks and read their data: what is wrong with them shows before a model is built.

    Raises:
        ConfigError: A task is unknown, or its data are not there or damaged.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # the harness's own bars; progress is reported
    if not options.allow_download:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
    from megatron_7b.evaluation.harness.tasks import check_examples, check_labels, find_tasks, local_data_sets

    manager = find_tasks(options.tasks, options.include_path)
    loaded = []
    with local_data_sets(options.task_data, may_download=options.allow_download) as lacking:
        for name in options.tasks:
            try:
                found = manager.load([name])
                for task in found["tasks"].values():
                    check_examples(task, options.num_fewshot)
                    check_labels(task, options.limit)
            except ConfigError:
                raise
            except IndexError as error:  # the harness looks at the first question at once
                raise ConfigError(
                    f"the data of {name} have no rows in the split that it is measured on",
                    hint=(f"it has none in {', '.join(lacking)}; " if lacking else "")
                    + "its YAML file names the splits, as test_split or validation_split",
                ) from error
            except Exception as error:
                raise ConfigError(
                    f"task {name} cannot be loaded: {type(error).__name__}: {error}",
                    hint="see its YAML file; data files need the columns that it names",
                ) from error
            loaded += list(found["groups"].values()) or list(found["tasks"].values())
    return LoadedTasks(loaded, manager)


def run_tasks(
    copies: "Copies", tasks: LoadedTasks, options: HarnessOptions, report: Report, *, at_once: int | None = None
) -> TaskResults:
    """Measure a model on tasks, on the main rank, while it leads the others.

    Args:
        copies: The model.
        tasks: From `load_tasks`, of the same options.
        options: How.
        report: Takes what is being done, requests done and requests in all; what it raises ends the measuring.
        at_once: Requests between two reports; None: many, which is fastest.
    """
    import lm_eval

    from megatron_7b.evaluation.harness.language_model import MegatronLM

    with _no_questions_to_git():
        content = lm_eval.simple_evaluate(
            model=MegatronLM(copies, report, at_once=at_once),
            tasks=tasks.loaded,
            task_manager=tasks.manager,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            apply_chat_template=options.apply_chat_template,
            system_instruction=options.system_instruction,
            gen_kwargs=options.gen_kwargs,
            log_samples=options.log_samples,
            bootstrap_iters=1000,
            random_seed=options.seed,
            numpy_random_seed=options.seed,
            torch_random_seed=options.seed,
            fewshot_random_seed=options.seed,
        )
    about = {
        "checkpoint": str(copies.session.setup.folder.absolute()),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "version": __version__,
        "layout": str(copies.session.layout),
    }
    return TaskResults(_as_json({**content, "megatron_7b": about}))


@contextlib.contextmanager
def _no_questions_to_git() -> Iterator[None]:
    """Keep the harness from asking git about the working folder, which writes "fatal: not a git repository"."""
    from lm_eval import evaluator

    asked = evaluator.get_git_commit_hash
    evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = asked


def _as_json(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what JSON can hold: functions become their names."""
    plain: dict[str, Any] = json.loads(
        json.dumps(content, default=lambda value: getattr(value, "__name__", str(value)))
    )
    return plain
