"""A target text, from a source: translations, summaries, answers (supervised fine-tuning)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_7b.config.schema import RunConfig
from megatron_7b.data.records.encoder_decoder import EncoderDecoderDataset
from megatron_7b.data.records.rows import RecordLayout
from megatron_7b.data.records.source_target import NAME
from megatron_7b.data.samples.opening import UNKNOWN_CONTENTS
from megatron_7b.data.samples.sample_order import Reached
from megatron_7b.data.samples.sets import find_sets, whole_corpus
from megatron_7b.data.samples.split import Split
from megatron_7b.objective.records import RecordObjective
from megatron_7b.parallel import ParallelLayout
from megatron_7b.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

    from megatron_7b.data import Batch


class SourceContinuation(RecordObjective):
    """For decoders: samples are rows of prompts, each with its target after it; only targets are trained."""

    kind = f"{NAME} for decoders"


class SourceToTarget(RecordObjective):
    """For encoder-decoders: the encoder reads the source, the decoder writes the target; a record per sample."""

    kind = f"{NAME} for encoder-decoders"

    def predicted_share(self, config: RunConfig) -> float:
        """Return how many tokens the decoder predicts at most for each of the encoder's."""
        return longest_target(config) / config.data.seq_length

    def open_split(
        self,
        config: RunConfig,
        split: Split,
        tokenizer: Tokenizer | None,
        *,
        contents: Mapping[str, str] = UNKNOWN_CONTENTS,
        reached: Reached | None = None,
    ) -> EncoderDecoderDataset:
        """Open the records of a split."""
        layout = self._layout(config, tokenizer)
        return EncoderDecoderDataset(find_sets(config.data, split), layout, contents=contents, reached=reached)

    def open_corpus(self, prefix: str, config: RunConfig, tokenizer: Tokenizer | None) -> EncoderDecoderDataset:
        """Open all records of a corpus, once and in their order."""
        return EncoderDecoderDataset(whole_corpus(prefix), self._layout(config, tokenizer), shuffle=False)

    def model_inputs(self, batch: "Batch", device: "torch.device", layout: ParallelLayout) -> dict[str, Any]:
        """Return what the model's forward takes of one microbatch, on the device."""
        from megatron_7b.objective.inputs import encoder_decoder_inputs

        return encoder_decoder_inputs(batch, device, layout)

    def _layout(self, config: RunConfig, tokenizer: Tokenizer | None) -> RecordLayout:  # noqa: ARG002
        """A record has a row for itself, long enough for the longest source and target, and a token to begin with."""
        length = config.data.seq_length + longest_target(config) + 1
        return RecordLayout(seq_length=length, seed=config.training.seed, packed=False, pad_id=0, name=self.kind)


def longest_target(config: RunConfig) -> int:
    """Return how many tokens a target may have, its end included."""
    return config.finetune.max_target_length or config.data.seq_length
