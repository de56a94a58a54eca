"""What a teacher finds most probable, for each token of the samples that runs will read: written once."""

import dataclasses
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from megatron_7b.checkpoint import tokenizer_path
from megatron_7b.checkpoint.base import weights_identity
from megatron_7b.checkpoint.manifest import read_manifest
from megatron_7b.config.schema import RunConfig
from megatron_7b.data.samples.corpus_tokenizer import find_tokenizer
from megatron_7b.data.samples.teacher_logits import CachedLogits, bytes_per_token, reading_of
from megatron_7b.data.upkeep.quick_check import check_corpora, find_prefixes, refuse_damaged
from megatron_7b.errors import ConfigError
from megatron_7b.objective import build_objective
from megatron_7b.objective.objective import Samples
from megatron_7b.page_parts import format_size
from megatron_7b.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from megatron_7b.model.on_ranks import ModelOnRanks

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """What is kept.

    Attributes:
        top_k: Tokens of each prediction.
        num_samples: Samples from the beginning of a run; None: those of one epoch.
        temperature: What logits are divided by.
        dtype: Number format of the logarithms of probabilities.
    """

    top_k: int = 64
    num_samples: int | None = None
    temperature: float = 1.0
    dtype: Literal["fp16", "fp32"] = "fp16"


def open_samples(folder: Path, config: RunConfig) -> Samples:
    """Open the samples that a run with this data, sequence length and seed reads, in its order.

    Args:
        folder: The teacher's checkpoint.
        config: From `inference_config`, with the run's `data.train`, `data.seq_length`, `data.split`, `training.seed`.

    Raises:
        ConfigError: The corpus was written with another tokenizer than the teacher's, or the teacher is no decoder.
        DataFormatError: It is damaged.
    """
    if config.objective_name != "causal":
        raise ConfigError(f"{folder} was trained by the objective {config.objective_name}, expected causal")
    tokenizer = find_tokenizer(config.data, of_model=tokenizer_path(folder))
    checked = check_corpora(find_prefixes(config.data), full=False)
    refuse_damaged(checked)
    contents = {one.prefix: one.content for one in checked}
    return build_objective(config).open_split(config, "train", tokenizer, contents=contents, reached=None)


def check_cache(folder: Path, config: RunConfig, output: Path, options: CacheOptions) -> Samples:
    """Open the samples, and refuse what cannot be written: no model is needed to know it.

    Args:
        folder: The teacher's checkpoint.
        config: As for `open_samples`.
        output: Beginning of the names of the files.
        options: What is kept.

    Raises:
        ConfigError: An option is impossible, the output exists, or there is no room for it.
        MegatronError: As `open_samples`.
    """
    _check(options, output, read_manifest(folder).vocab_size)
    samples = open_samples(folder, config)
    count = options.num_samples or samples.num_samples
    samples.check_end(count)
    # Files that are mapped into memory end the process, without a word, where the disk is full.
    there = next(place for place in output.resolve().parents if place.exists())
    needed = count * samples.order.seq_length * bytes_per_token(options.top_k, options.dtype)
    free = shutil.disk_usage(there).free
    if needed > free:
        raise ConfigError(
            f"{output} would take {format_size(needed)}B: {count:,} samples of {samples.order.seq_length:,} tokens, "
            f"with {options.top_k} probabilities each; but in {there} there is room for {format_size(free)}B",
            hint="choose another --output, or a smaller --num-samples or --top-k",
        )
    return samples


def cache_logits(
    folder: Path,
    config: RunConfig,
    output: Path,
    options: CacheOptions,
    *,
    fp32_on_cpu: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> CachedLogits:
    """Write what a teacher finds most probable, as `OUTPUT.ids`, `.logps` and, once they are complete, `.json`.

    Args:
        folder: The teacher's checkpoint.
        config: As for `open_samples`.
        output: Beginning of the names of the files.
        options: What is kept.
        fp32_on_cpu: As for `opened_model`.
        on_progress: Takes samples done and samples of all, on the main rank.

    Returns:
        What was written.

    Collective: all ranks of the launcher's world.

    Raises:
        MegatronError: As `check_cache`; or the checkpoint cannot be read.
    """
    samples = check_cache(folder, config, output, options)
    count = options.num_samples or samples.num_samples
    from megatron_7b.checkpoint.open_model import opened_model
    from megatron_7b.training.agreement import Ranks

    carried = tokenizer_path(folder)
    manifest = CachedLogits(
        num_samples=count,
        top_k=options.top_k,
        temperature=options.temperature,
        vocab_size=read_manifest(folder).vocab_size,
        tokenizer=load_tokenizer(carried).identity if carried is not None else None,
        teacher=weights_identity(read_manifest(folder)),
        dtype=options.dtype,
        order=samples.order.to_dict(),
        reading=reading_of(config.data),
    )
    with opened_model(folder, config, fp32_on_cpu=fp32_on_cpu) as model:
        ranks, files = Ranks(model.device), None
        with ranks.together("opening the files of logits"):
            if ranks.is_main:
                output.parent.mkdir(parents=True, exist_ok=True)
                files = manifest.open(output, "w+")
        for done, mine in _answers(model, samples, manifest):
            of_ranks = ranks.gather(mine)
            with ranks.together("keeping logits"):
                if files is not None:
                    for numbers, ids, logps in (answer for of_rank in of_ranks for answer in of_rank):
                        is_there = numbers < count
                        files.ids[numbers[is_there]] = ids[is_there]
                        files.logps[numbers[is_there]] = logps[is_there]
                    if on_progress is not None:
                        on_progress(min(done, count), count)
        with ranks.together("completing the files of logits"):
            if files is not None:
                for part in files:
                    assert isinstance(part, np.memmap)
                    part.flush()
                manifest.write(output)
    return manifest


def _check(options: CacheOptions, output: Path, vocab_size: int) -> None:
    if not 1 <= options.top_k <= vocab_size:
        raise ConfigError(f"--top-k is {options.top_k}, expected 1 to {vocab_size}, the size of the vocabulary")
    if not options.temperature > 0:
        raise ConfigError(f"--temperature is {options.temperature:g}, expected more than 0")
    if options.num_samples is not None and options.num_samples < 1:
        raise ConfigError(f"--num-samples is {options.num_samples}, expected at least 1")
    if Path(f"{output}.json").exists():
        raise ConfigError(f"{output}.json exists", hint="choose another --output, or delete it")


def _answers(
    model: "ModelOnRanks", samples: Samples, manifest: CachedLogits
) -> Iterator[tuple[int, list[tuple[Any, Any, Any]]]]:
    """Yield how many samples are done, and numbers, ids and logarithms of this rank's. Collective: all ranks."""
    import torch

    from megatron_7b.model.kinds.decoder.network import LanguageModel
    from megatron_7b.model.top_logits import top_log_probabilities
    from megatron_7b.objective.microbatches import rounds_in_order, run_outputs

    layout, objective, size = model.layout, build_objective(model.config), model.config.training.micro_batch_size
    for end, places in rounds_in_order(layout, size, manifest.num_samples):
        batches = [samples.batch(numbers) for numbers in places]
        beside = [{"wants_states": True}] * len(batches)
        with torch.no_grad():
            states = run_outputs(model.chunks, batches, objective, layout=layout, device=model.device, beside=beside)
            mine = []
            for numbers, hidden in zip(places, states, strict=False):
                chunk = model.chunks[-1]
                assert isinstance(chunk, LanguageModel)
                ids, logps = top_log_probabilities(
                    *chunk.states_and_weight(hidden), top_k=manifest.top_k, temperature=manifest.temperature,
                    **chunk.place_in_vocabulary(),
                )  # fmt: skip
                length, rows = samples.order.seq_length, len(numbers)
                if layout.tp_rank == 0:  # positions come before rows, unless the rows were laid one after the other
                    shape = (length, rows) if hidden.shape[1] == rows else (rows, length)
                    parts = [part.view(*shape, -1).cpu().numpy() for part in (ids, logps)]
                    if shape[0] == length and hidden.shape[1] == rows:
                        parts = [part.swapaxes(0, 1) for part in parts]
                    mine.append((numbers, parts[0].astype(np.uint32), parts[1]))
        yield end, mine
