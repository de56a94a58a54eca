"""The loss of a model on a corpus: every token but the first predicted exactly once, the same figure at every layout.

Which tokens the model sees. Let t be all tokens of the corpus in the order of the file, documents one after the other
with whatever separates them there (an end-of-document token, where `--append-eod` was given), N in number, and S the
sequence length. Window k, from 0 to ceil((N-1)/S) - 1, has the inputs t[kS] … t[kS+S-1] at positions 0 … S-1 and the
labels t[kS+1] … t[kS+S]; the last window ends with the corpus. So windows do not overlap in what they predict,
nothing is carried from one window to the next, and the context of a prediction is 1 to S tokens. The loss is the sum of
-ln p(label) over all N-1 labels, divided by N-1.

What the model was trained on, it is measured on: attention crosses the borders of documents, unless the dataset says
where they are (`data.reset_attention_mask`), and the prediction after an end-of-document token counts, unless the
dataset masks it (`data.eod_mask_loss`; the loss is then the mean over fewer labels). So the figure is the one that
validation during training would give on the same windows.

With transformers the same figure, without these two options, comes from

    for k in range(0, N - 1, S):
        window = t[k : k + S + 1]
        total += cross_entropy(model(window[:-1]).logits, window[1:], reduction="sum")
    loss = total / (N - 1)
"""

import math
from collections.abc import Callable

import numpy as np
import torch

from megatron_7b.data import Batch
from megatron_7b.errors import ConfigError
from megatron_7b.evaluation.result import CorpusLoss, EvaluationProgress
from megatron_7b.model.on_ranks import ModelOnRanks
from megatron_7b.objective import build_objective
from megatron_7b.objective.microbatches import rounds_in_order, run_microbatches
from megatron_7b.objective.objective import Samples
from megatron_7b.parallel.groups import broadcast_from_last_stage, sum_over_replicas


@torch.inference_mode()
def measure_loss(
    model: ModelOnRanks,
    dataset: Samples,
    *,
    max_samples: int | None = None,
    report: Callable[[EvaluationProgress], None] | None = None,
) -> CorpusLoss:
    """Measure the loss on a corpus read in order; the module's docstring says on which tokens exactly.

    The result does not depend on the microbatch size and the layout, except for FP32 rounding within the model.

    Args:
        model: A loaded model; `training.micro_batch_size` windows go through it at a time.
        dataset: From `corpus.open_corpus`, with the model's sequence length.
        max_samples: Stop after this many windows; None reads all.
        report: Called from time to time, on every rank.

    Returns:
        The same on all ranks.

    Collective: all ranks.

    Raises:
        ConfigError: There is nothing to read, or nothing that counts.
        DataFormatError: A token id is outside the vocabulary.
    """
    num_windows = dataset.num_samples if max_samples is None else min(max_samples, dataset.num_samples)
    if num_windows < 1:
        raise ConfigError(f"max_samples is {max_samples}, expected at least 1")
    objective = build_objective(model.config)
    totals = torch.zeros(2, dtype=torch.float64, device=model.device)
    result = CorpusLoss(math.nan, 0)
    for end, rows in rounds_in_order(model.layout, model.config.training.micro_batch_size, num_windows):
        totals += run_microbatches(
            model.chunks,
            [_read(dataset, indices, num_windows) for indices in rows],
            objective,
            layout=model.layout,
            device=model.device,
            forward_only=True,
        )[0]
        loss_sum, num_tokens = broadcast_from_last_stage(sum_over_replicas(totals.clone())).tolist()
        result = CorpusLoss(loss_sum / num_tokens if num_tokens else math.nan, round(num_tokens))
        if report is not None:
            report(EvaluationProgress(min(end, num_windows), num_windows, result))
    if result.tokens == 0:
        raise ConfigError(
            f"no prediction counts in the {num_windows:,} windows: all inputs are end-of-document tokens",
            hint="--data.eod-mask-loss False counts what is predicted after them",
        )
    return result


def _read(dataset: Samples, windows: np.ndarray, num_windows: int) -> Batch:
    """Return windows as a microbatch; those beyond the end count nothing."""
    return dataset.batch(windows).counting(windows < num_windows)
