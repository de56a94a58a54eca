"""What a run reads: the tokenizer that its corpora were written with, and batches of training and validation data."""

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_7b.config.schema import DataConfig, RunConfig
from megatron_7b.data import BatchLoader, Split, has_split, open_split, parse_blend, resolve_prefix
from megatron_7b.data.show import ManifestTokenizer, manifest_tokenizer
from megatron_7b.errors import ConfigError
from megatron_7b.parallel import ParallelLayout
from megatron_7b.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Batches by their global sample number."""

    training: BatchLoader
    validation: BatchLoader | None
    """None where the data leaves nothing to validate on."""

    @property
    def num_validation_samples(self) -> int:
        """Samples of one epoch of the validation data."""
        return self.validation.dataset.num_samples if self.validation is not None else 0


def find_tokenizer(data: DataConfig) -> Tokenizer | None:
    """Load the tokenizer that the configuration names, else the one that the manifests of the corpora name.

    Args:
        data: The data section.

    Returns:
        The tokenizer, or None where neither names one that is there.

    Raises:
        ConfigError: A corpus was written with another tokenizer.
        DataFormatError: What is named is no tokenizer, or a corpus is missing.
    """
    named = _named_by_corpora(data)
    if data.tokenizer is not None:
        tokenizer = load_tokenizer(data.tokenizer)
    else:
        path = next((facts.path for facts in named.values() if facts.path is not None), None)
        if path is None:
            return None
        tokenizer = load_tokenizer(path)
    for prefix, facts in named.items():
        if facts.identity not in (None, tokenizer.identity):
            raise ConfigError(
                f"{prefix} was written with the tokenizer {facts.written_path} (identity {facts.identity}), but this run "
                f"uses {tokenizer.path or tokenizer.kind} (identity {tokenizer.identity}): its ids would mean other text",
                hint="write all corpora of a run with one tokenizer, and leave data.tokenizer out or at that one",
            )
    return tokenizer


def complete_config(config: RunConfig, tokenizer: Tokenizer | None) -> RunConfig:
    """Fill in the vocabulary size from the tokenizer.

    Raises:
        ConfigError: The size is not known, or smaller than the tokenizer's.
    """
    vocab_size = config.model.vocab_size
    if tokenizer is None:
        if vocab_size is None:
            raise ConfigError(
                "the size of the vocabulary is not known: no corpus names a tokenizer that is still there, and neither "
                "data.tokenizer nor model.vocab_size is set",
                hint="set data.tokenizer to the tokenizer that the corpus was written with",
            )
        return config
    if vocab_size is not None and vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {vocab_size}, but the tokenizer has {tokenizer.vocab_size} tokens",
            hint="leave model.vocab_size out: it is taken from the tokenizer",
        )
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, vocab_size=vocab_size or tokenizer.vocab_size)
    )


@contextmanager
def open_inputs(config: RunConfig, layout: ParallelLayout, *, eod_id: int | None) -> Iterator[Inputs]:
    """Open training and validation data for the duration of a with block.

    Args:
        config: Effective configuration.
        layout: Position of this rank; ranks of one replica read the same samples.
        eod_id: End-of-document token, for data.eod_mask_loss.

    Raises:
        ConfigError: The blend or the split is malformed.
        DataFormatError: A file is damaged, or the training data is smaller than one sample.

    Collective: none.
    """

    def loader(split: Split, num_workers: int) -> BatchLoader:
        dataset = open_split(
            config.data, split, seed=config.training.seed, vocab_size=config.model.vocab_size, eod_id=eod_id
        )
        return BatchLoader(
            dataset,
            micro_batch_size=config.training.micro_batch_size,
            data_parallel_rank=layout.dp_rank,
            data_parallel_size=layout.dp_size,
            num_workers=num_workers,
        )

    with loader("train", config.data.num_workers) as training:
        if not has_split(config.data, "valid"):
            yield Inputs(training, None)
            return
        with loader("valid", 0) as validation:
            yield Inputs(training, validation)


def _named_by_corpora(data: DataConfig) -> dict[str, ManifestTokenizer]:
    """Return what the manifest of each corpus says of its tokenizer, by prefix; foreign corpora have no manifest."""
    parts = parse_blend(data.train) + (parse_blend(data.valid, name="data.valid") if data.valid else ())
    prefixes = [resolve_prefix(part.prefix) for part in parts]
    facts = {prefix: manifest_tokenizer(prefix) for prefix in prefixes}
    return {prefix: named for prefix, named in facts.items() if named is not None}
