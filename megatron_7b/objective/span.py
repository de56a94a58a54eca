"""What was in the gaps of a text (T5)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_7b.config.schema import RunConfig
from megatron_7b.data import Dataset, open_sequential, open_split
from megatron_7b.data.samples.opening import UNKNOWN_CONTENTS
from megatron_7b.data.samples.sample_order import Reached
from megatron_7b.data.samples.span_corruption import (
    Corruption,
    SpanCorruptionDataset,
    fit_lengths,
    open_corrupted_split,
    windows_of_samples,
)
from megatron_7b.data.samples.split import Split
from megatron_7b.errors import ConfigError
from megatron_7b.objective.token_losses import TokenLosses
from megatron_7b.parallel import ParallelLayout
from megatron_7b.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

    from megatron_7b.data import Batch

USUAL_SENTINELS = 100
"""As many as T5's tokenizers have."""


class SpanCorruption(TokenLosses):
    """Samples are windows with gaps, and what the gaps have lost; only the latter is predicted."""

    needs_tokenizer = True

    def check_tokenizer(self, config: RunConfig, tokenizer: Tokenizer | None) -> None:
        """It must have an end of document, padding, and a sentinel for each gap of a sample."""
        build_corruption(config, tokenizer)

    def window_length(self, config: RunConfig) -> int:
        """Return the longer window: a text gets shorter as it loses spans, so a sample takes more than it has."""
        return fit_lengths(config.data.seq_length, config.objective).raw

    def predicted_share(self, config: RunConfig) -> float:
        """Return how many tokens the decoder predicts for each of the encoder's."""
        return fit_lengths(config.data.seq_length, config.objective).decoder / config.data.seq_length

    def open_windows(
        self,
        config: RunConfig,
        split: Split,
        *,
        contents: Mapping[str, str] = UNKNOWN_CONTENTS,
        reached: Reached | None = None,
    ) -> Dataset:
        """Open the windows as they are before they lose anything."""
        data = windows_of_samples(config.data, config.objective)
        return open_split(data, split, seed=config.training.seed, contents=contents, reached=reached)

    def open_split(
        self,
        config: RunConfig,
        split: Split,
        tokenizer: Tokenizer | None,
        *,
        contents: Mapping[str, str],
        reached: Reached | None,
    ) -> SpanCorruptionDataset:
        """Open corrupted windows of the stream of documents."""
        return open_corrupted_split(
            config.data,
            split,
            build_corruption(config, tokenizer),
            seed=config.training.seed,
            vocab_size=config.model.vocab_size,
            contents=contents,
            reached=reached,
        )

    def open_corpus(self, prefix: str, config: RunConfig, tokenizer: Tokenizer | None) -> SpanCorruptionDataset:
        """Open a corpus window by window; what each loses follows from the run's seed."""
        corruption = build_corruption(config, tokenizer)
        windows = open_sequential(prefix, seq_length=self.window_length(config), vocab_size=config.model.vocab_size)
        return SpanCorruptionDataset(windows, corruption, seed=config.training.seed)

    def model_inputs(self, batch: "Batch", device: "torch.device", layout: ParallelLayout) -> dict[str, Any]:
        """Return what the model's forward takes of one microbatch, on the device."""
        from megatron_7b.objective.inputs import encoder_decoder_inputs

        return encoder_decoder_inputs(batch, device, layout)


def find_sentinels(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids of `<extra_id_0>`, `<extra_id_1>`, …, whatever their order in the vocabulary."""
    ids = {tokenizer.spell(token): token for token in tokenizer.special_ids}
    if "<extra_id_0>" not in ids:  # some tokenizers have them as ordinary tokens
        ids = {tokenizer.spell(token): token for token in range(tokenizer.vocab_size)}
    sentinels: list[int] = []
    while (name := f"<extra_id_{len(sentinels)}>") in ids:
        sentinels.append(ids[name])
    return tuple(sentinels)


def build_corruption(config: RunConfig, tokenizer: Tokenizer | None) -> Corruption:
    """Return how text is corrupted, with the special tokens of the tokenizer.

    Raises:
        ConfigError: The tokenizer is not known or lacks a token, or the options ask for an impossible sample.
    """
    if tokenizer is None:
        raise ConfigError(
            "span corruption needs sentinels, padding and an end of document, but the tokenizer of the corpora is not "
            "known",
            hint="name it as data.tokenizer",
        )
    num_spans = fit_lengths(config.data.seq_length, config.objective).spans
    sentinels, start = find_sentinels(tokenizer), tokenizer.special_id("pad")
    eos = tokenizer.special_id("sep") if tokenizer.eod_id is None else tokenizer.eod_id  # BERT's has no other end
    place = f" ({tokenizer.path})" if tokenizer.path is not None else ""
    if not sentinels or start is None or eos is None:
        found = (("an end of document", eos), ("<pad>", start), ("<extra_id_0>, <extra_id_1>, …", sentinels or None))
        missing = [name for name, token in found if token is None]
        wanted = max(USUAL_SENTINELS, num_spans)
        raise ConfigError(
            f"span corruption needs tokens that the tokenizer{place} lacks: {', '.join(missing)}",
            hint="preprocess the text with a tokenizer of T5's kind, such as one from `megatron-7b tokenizer train "
            f"--special-tokens '<|endoftext|>' '<pad>' $(seq -f '<extra_id_%g>' 0 {wanted - 1})`",
        )
    if num_spans > len(sentinels):
        objective = config.objective
        raise ConfigError(
            f"samples of data.seq_length = {config.data.seq_length} lack {num_spans} spans (objective.noise_density "
            f"{objective.noise_density}, objective.mean_span_length {objective.mean_span_length}), but the tokenizer"
            f"{place} has {len(sentinels)} sentinels",
            hint="make samples shorter or spans longer, or preprocess the text with a tokenizer that has more: "
            f"$(seq -f '<extra_id_%g>' 0 {num_spans - 1})",
        )
    return Corruption(
        sentinel_ids=sentinels,
        eos_id=eos,
        start_id=start,
        noise_density=config.objective.noise_density,
        mean_span_length=config.objective.mean_span_length,
    )
