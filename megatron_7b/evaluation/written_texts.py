"""What a checkpoint writes for sources of a file, compared with the targets: translations, summaries, answers."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_7b.checkpoint import resolve_checkpoint
from megatron_7b.checkpoint.inference_config import inference_config
from megatron_7b.data.records.reading import RecordError, as_line, read_records
from megatron_7b.data.records.source_target import EXAMPLE, NAME, PromptTemplate, SourceTarget, read_template
from megatron_7b.errors import ConfigError
from megatron_7b.evaluation.text_measures import MeasureOptions, TextMeasure, measure_texts
from megatron_7b.generation.options import GenerationOptions
from megatron_7b.generation.prompts import Prompt
from megatron_7b.generation.setup import DEFAULT_MAX_NEW_TOKENS, REQUIREMENTS, GenerationSetup, read_setup
from megatron_7b.runtime.output_paths import check_file_to_write
from megatron_7b.runtime.rescue import write_or_rescue

DEFAULT_BATCH_SIZE = 16
_BATCHES_PER_REPORT = 4


@dataclass(frozen=True)
class WrittenTexts:
    """What an evaluation found.

    Attributes:
        measures: The figures, in percent.
        num_texts: Texts that were written.
        num_cut_sources: Of these, from sources that had to be cut.
        num_unfinished: Of these, texts that were stopped at their longest.
        num_new_tokens: Tokens that were written.
        seconds: It took, without loading the model.
        texts: What was written, in the order of the records.
    """

    measures: tuple[TextMeasure, ...]
    num_texts: int
    num_cut_sources: int
    num_unfinished: int
    num_new_tokens: int
    seconds: float
    texts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TextTask:
    """Sources, and how texts are made of them and measured; all checked.

    Attributes:
        setup: Of the checkpoint.
        records: The lines of the file, as they are.
        prompts: One each.
        targets: What was expected.
        num_cut: Sources that had to be cut.
        generation: How texts are written.
        measures: How they are compared.
        output: File for the records with what was written; None: nowhere.
        batch_size: Texts (beams) that share a forward pass.
    """

    setup: GenerationSetup
    records: list[dict[str, Any]]
    prompts: list[Prompt]
    targets: list[str]
    num_cut: int
    generation: GenerationOptions
    measures: MeasureOptions
    output: Path | None
    batch_size: int


def evaluate_written_texts(
    checkpoint: str | Path,
    file: str | Path,
    *,
    generation: GenerationOptions | None = None,
    measures: MeasureOptions | None = None,
    output: str | Path | None = None,
    overrides: Mapping[str, object] | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    limit: int | None = None,
    warn: Callable[[str], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> WrittenTexts | None:
    """Have a checkpoint write a text for each source of a JSONL file, and compare them with the targets.

    Args:
        checkpoint: A step folder, `RUN/checkpoints/latest` or a run folder.
        file: Records as for `finetune --finetune.task sequence_to_sequence`; the run's template makes prompts of them.
        generation: How texts are written; None: greedily.
        measures: How they are compared.
        output: File for the records, each with what was written as `prediction`.
        overrides: Options by dotted path, such as `{"finetune.prompt_template": "Summarize: {source}"}`.
        batch_size: Texts (beams, in a search) that share a forward pass.
        limit: Only the first records.
        warn: Takes warnings.
        on_progress: Called with the number of texts that are done, and that of all.

    Returns:
        What was found; None on all ranks but the main one.

    Collective: all ranks of the launcher's world; a process without a launcher is a world of its own.

    Raises:
        CheckpointError: There is no complete checkpoint, or it is damaged.
        ConfigError: An option is impossible, or the model writes no text.
        DataFormatError: Records cannot be used; all mistakes are named with file and line.
        MegatronError: `output` cannot be written; the message says where its content is instead.
    """
    folder = resolve_checkpoint(Path(checkpoint))
    config = inference_config(folder, overrides, requirements=REQUIREMENTS)
    task = read_text_task(
        read_setup(folder, config), Path(file), generation=generation, measures=measures,
        output=None if output is None else Path(output), batch_size=batch_size, limit=limit,
    )  # fmt: skip
    fp32_on_cpu = "precision.params_dtype" not in (overrides or {})
    found = run_text_task(task, fp32_on_cpu=fp32_on_cpu, warn=warn, on_progress=on_progress)
    if found is not None:
        write_texts(task, found)
    return found


def read_text_task(
    setup: GenerationSetup,
    file: Path,
    *,
    generation: GenerationOptions | None = None,
    measures: MeasureOptions | None = None,
    output: Path | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    limit: int | None = None,
) -> TextTask:
    """Read and check everything before a model is loaded; the arguments are those of `evaluate_written_texts`.

    Raises:
        ConfigError: An option is impossible.
        DataFormatError: Records cannot be used.
    """
    options = setup.config.finetune
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}, expected at least 1")
    if output is not None:
        check_file_to_write(output, "the file of predictions")
    template = read_template(options.prompt_template, options.target_key, setup.config.model.traits.kind)
    generation = generation or GenerationOptions(temperature=0.0)
    longest = generation.max_new_tokens or _longest_target(setup)
    room = _longest_prompt(setup, longest)
    if room < 1:
        raise ConfigError(
            f"texts of {longest} tokens leave no room for a prompt in the context of {setup.context}",
            hint="--max-new-tokens N lets them be shorter",
        )
    records: list[dict[str, Any]] = []
    prompts: list[Prompt] = []
    targets: list[str] = []
    num_cut = 0

    def use(record: dict[str, Any]) -> tuple[dict[str, Any], SourceTarget, Prompt]:
        said = template.read(record)
        return record, said, _fitted(template, said, setup, room)

    for _, (record, said, prompt) in read_records(file, use, name=NAME, example=EXAMPLE):
        if limit is not None and len(records) == limit:
            break
        num_cut += prompt.text != template.fill(said.fields)
        records.append(record)
        prompts.append(prompt)
        targets.append(str(said.target))
    task = TextTask(
        setup=setup, records=records, prompts=prompts, targets=targets, num_cut=num_cut,
        generation=dataclasses.replace(generation, max_new_tokens=longest), measures=measures or MeasureOptions(),
        output=output, batch_size=max(batch_size, generation.num_beams or 1),
    )  # fmt: skip
    setup.requests(prompts, task.generation)  # refuses what does not fit
    measure_texts(["a"], ["a"], task.measures, warn=lambda _: None)  # a tokenizer may need a package that is not there
    return task


def run_text_task(
    task: TextTask,
    *,
    fp32_on_cpu: bool = True,
    warn: Callable[[str], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> WrittenTexts | None:
    """Write the texts and measure them; the arguments are those of `evaluate_written_texts`. Collective: all ranks."""
    from megatron_7b.generation.copies import Copies, GeneratedText
    from megatron_7b.generation.session import Session

    setup, how, total = task.setup, task.generation, len(task.prompts)
    with Session(setup, fp32_on_cpu=fp32_on_cpu, max_batch_size=task.batch_size, several_copies=True) as session:
        copies, start = Copies(session), time.perf_counter()
        if not session.is_main:
            copies.follow()
            return None
        written: dict[int, GeneratedText] = {}
        at_once = _BATCHES_PER_REPORT * task.batch_size * session.layout.dp_size
        by_length = sorted(range(total), key=lambda number: -len(task.prompts[number].ids))
        with copies.led():
            for first in range(0, total, at_once):
                numbers = by_length[first : first + at_once]
                texts = copies.generate([task.prompts[number] for number in numbers], how)
                written |= dict(zip(numbers, texts, strict=True))
                if on_progress is not None:
                    on_progress(len(written), total)
        seconds = time.perf_counter() - start
    texts = [written[number] for number in range(total)]
    predictions = tuple(text.text.strip() for text in texts)
    return WrittenTexts(
        measures=tuple(measure_texts(predictions, task.targets, task.measures, warn=warn)),
        num_texts=total,
        num_cut_sources=task.num_cut,
        num_unfinished=sum(text.finish_reason == "length" for text in texts),
        num_new_tokens=sum(len(text.token_ids) for text in texts),
        seconds=seconds,
        texts=predictions,
    )


def write_texts(task: TextTask, found: WrittenTexts) -> None:
    """Write the records of a task, each with what was written as `prediction`, to its output, if it has one.

    Raises:
        MegatronError: That fails; the message says where they are instead.
    """
    if task.output is None:
        return
    both = zip(task.records, found.texts, strict=True)
    lines = [as_line({**record, "prediction": text}) for record, text in both]
    write_or_rescue(task.output, lambda stream: stream.writelines(lines))


def _fitted(template: PromptTemplate, said: SourceTarget, setup: GenerationSetup, room: int) -> Prompt:
    """Return the prompt of a record, its longest text cut if need be.

    Raises:
        RecordError: Even without that text it is too long.
    """
    text = template.fitted(said.fields, lambda one: setup.encode(one).ids, room)
    if text is None:
        raise RecordError(f"its prompt has no room in {room} tokens")
    return setup.encode(text)


def _longest_prompt(setup: GenerationSetup, longest: int) -> int:
    """Return how many tokens a prompt may have: as in training, with room for the longest text after it."""
    trained = setup.config.data.seq_length
    if setup.context is None:
        return trained
    fitting = setup.context - longest
    return min(trained, fitting) if setup.config.finetune.task == "sequence_to_sequence" else fitting


def _longest_target(setup: GenerationSetup) -> int:
    """Return how many tokens a text may have, if nobody says so: as in training, or the usual number.

    A decoder's prompt and text share its context, of which half is left to the prompt.
    """
    options = setup.config.finetune
    usual = DEFAULT_MAX_NEW_TOKENS if setup.context is None else min(DEFAULT_MAX_NEW_TOKENS, setup.context // 2)
    if options.task != "sequence_to_sequence":
        return usual
    return options.max_target_length or min(usual, setup.config.data.seq_length)
