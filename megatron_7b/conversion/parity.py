"""Compares the logits of two models: a conversion is published only if they agree.

The comparison runs on the very weights that were written, so that rounding them to BF16 is not counted as a
difference. In FP32 two right implementations differ only by the order of their sums.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megatron_7b.config.schema import ModelConfig
from megatron_7b.conversion.adapters.applying import with_adapter
from megatron_7b.conversion.families import FAMILIES
from megatron_7b.conversion.folder_reader import CONFIG_FILE
from megatron_7b.conversion.json_files import read_json
from megatron_7b.conversion.reference import reported
from megatron_7b.errors import ConversionError
from megatron_7b.runtime.cpu.vector_math import settle_vector_functions

FP32_TOLERANCE = 1e-4
"""Largest difference of a logit in FP32 arithmetic: absolute, or in units of the logits' spread where that exceeds 1.

The spread (standard deviation) matters because rounding grows with the numbers rounded. Measured on SmolLM2-135M,
whose logits have a spread of 4.1 and reach 34: two right implementations differ by 0.7e-4, each by 0.8e-4 from FP64.
All faults tried are above the tolerance of 4.1e-4: the rotary base off by 0.01 % makes 6e-4, the norm's epsilon 1e-6
for 1e-5 makes 360e-4, one key channel lost in one head 2,200e-4, two heads swapped in one layer 25,000e-4.
"""

BF16_TOLERANCE = 0.15
"""Largest root-mean-square difference in BF16 arithmetic, in units of the logits' spread.

BF16 keeps 8 significant bits, so that every activation stored is off by up to 0.2 %, and the errors of all layers add
up: SmolLM2-135M in BF16 is 0.046 away from itself in FP64, and two right implementations are 0.051 apart. Gate and up
swapped in one layer of 30 make 0.8, but two heads swapped in one layer only 0.085: what is wrong in a single layer can
hide, which is why FP32 is what a conversion is checked in unless the memory does not suffice.
"""


@dataclass(frozen=True)
class Parity:
    """How far two sets of logits are apart.

    Attributes:
        max_abs_difference: Largest absolute difference of one logit.
        max_rel_difference: The same, divided by the largest absolute logit of the reference.
        rms_rel_difference: Root-mean-square difference, divided by `spread`.
        spread: Standard deviation of the reference's logits.
        sample: Sample, position and token of the largest difference.
        position: See `sample`.
        token_id: See `sample`.
        reference_logit: The reference's logit there.
        logit: The other model's logit there.
        first_position: First position with a difference above the FP32 tolerance; None where there is none.
        argmax_agreement: Share of positions at which both models put the same token first.
        num_positions: Positions compared.
    """

    max_abs_difference: float
    max_rel_difference: float
    rms_rel_difference: float
    spread: float
    sample: int
    position: int
    token_id: int
    reference_logit: float
    logit: float
    first_position: int | None
    argmax_agreement: float
    num_positions: int

    def is_within(self, arithmetic: torch.dtype) -> bool:
        """Whether the difference is explained by rounding in the given arithmetic. Never true for NaN."""
        if arithmetic == torch.float32:
            return self.max_abs_difference <= fp32_tolerance(self.spread)
        return self.rms_rel_difference <= BF16_TOLERANCE

    def tolerance(self, arithmetic: torch.dtype) -> str:
        """What is tolerated, in words."""
        if arithmetic == torch.float32:
            return f"{fp32_tolerance(self.spread):.1e} in FP32"
        return f"an rms of {BF16_TOLERANCE:g} in BF16"

    def describe(self) -> str:
        """One line of figures."""
        return (
            f"largest difference {self.max_abs_difference:.2e} (relative {self.max_rel_difference:.2e}, rms "
            f"{self.rms_rel_difference:.2e}) over {self.num_positions} positions, same first token at "
            f"{100 * self.argmax_agreement:.1f} %"
        )


def fp32_tolerance(spread: float) -> float:
    """Largest absolute difference that rounding explains, for logits of this standard deviation."""
    return FP32_TOLERANCE * max(1.0, spread)


def random_tokens(vocab_size: int, *, num_samples: int = 2, length: int = 128, seed: int = 1234) -> Tensor:
    """Draw token ids uniformly.

    Returns:
        int64 `[b, s]`.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (num_samples, length), generator=generator)


def answer_to(tokens: Tensor) -> Tensor:
    """Return what the decoder of an encoder-decoder is given: half of its text [..., s], from the last token back."""
    return tokens.flip(-1)[..., : max(1, tokens.shape[-1] // 2)]


def hugging_face_logits(
    folder: Path,
    tokens: Tensor,
    *,
    model: ModelConfig | None = None,
    round_to: torch.dtype | None = None,
    arithmetic: torch.dtype = torch.float32,
    device: str = "cpu",
    unused: Collection[str] = (),
    fresh: Mapping[str, Tensor] = MappingProxyType({}),
    of_pairs: bool = False,
    adapter: Path | None = None,
) -> Tensor:
    """Compute logits with transformers, which is the reference for what a folder means.

    Args:
        folder: Hugging Face model folder; nothing is fetched from anywhere.
        tokens: int64 `[b, s]`.
        model: Shape of the model, which may have a head that the folder lacks; None: what config.json says.
        round_to: Number format that weights are rounded to beforehand; None leaves them as they are.
        arithmetic: Number format to compute in.
        device: Where to compute.
        unused: Tensors of the folder that the model does not have.
        fresh: Tensors that the folder lacks, by name.
        of_pairs: The logits of the two classes of pairs of sentences instead of those of tokens.
        adapter: A PEFT folder that belongs to the model.

    Returns:
        FP32 `[b, s, v]` on the CPU; of an encoder-decoder, those of `answer_to(tokens)`; of pairs `[b, 1, 2]`; of a
        head, its outputs `[b, s, labels]`, or `[b, 1, labels]` for whole texts.

    Raises:
        ConversionError: Transformers cannot load the folder or compute with it, misses or ignores tensors in it, or
            computes logits that are not finite.
    """
    reference = _load_reference(folder, model, arithmetic, unused, fresh)
    with reported(f"transformers cannot compute with the model in {folder}"), torch.inference_mode():
        if adapter is not None:
            reference = with_adapter(reference, adapter)
        reference = reference.to(device).eval()
        if round_to is not None:
            round_parameters(reference, round_to)
        # One sample at a time: [s, v] in FP32 is what a large vocabulary makes expensive.
        outputs = (reference(**_inputs(reference, sample[None].to(device))) for sample in tokens)
        logits = [_logits(output, of_pairs=of_pairs).float().cpu() for output in outputs]
    stacked = torch.stack(logits)
    if not stacked.isfinite().all():
        raise ConversionError(
            f"the model in {folder} computes logits that are not finite, by transformers in {arithmetic}",
            hint="look for NaN and infinity in its weights; there is nothing to compare a conversion with",
        )
    return stacked


def _inputs(model: torch.nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    further = {"decoder_input_ids": answer_to(tokens)} if getattr(model.config, "is_encoder_decoder", False) else {}
    return {"input_ids": tokens, **further}


def _logits(output: Any, *, of_pairs: bool) -> Tensor:
    """Return the logits of the only sample, [s, v]; of pairs [1, 2]."""
    if of_pairs:
        pairs: Tensor = output.seq_relationship_logits
        return pairs
    if "start_logits" in output:
        return torch.stack((output.start_logits[0], output.end_logits[0]), dim=-1)
    logits: Tensor = output.prediction_logits if "prediction_logits" in output else output.logits
    return logits[0] if logits.dim() > 2 else logits  # those of a whole text are [1, labels]


def _load_reference(
    folder: Path,
    model: ModelConfig | None,
    arithmetic: torch.dtype,
    unused: Collection[str],
    fresh: Mapping[str, Tensor],
) -> torch.nn.Module:
    """Load the model of a folder with the class that computes what ours computes."""
    # Imported here: it takes seconds and only this function needs it.
    import transformers
    from transformers.utils import logging

    config = read_json(folder / CONFIG_FILE)
    family = FAMILIES.get(str(config.get("model_type")))
    loading_class = transformers.AutoModelForCausalLM
    if family is not None:
        names = [family.class_of(model)] if model is not None else config.get("architectures")
        name = names[0] if isinstance(names, list) and names else None
        loading_class = getattr(transformers, family.loading_class(name))
    of_head = {}
    if model is not None and model.has_head:
        of_head = {"num_labels": model.num_labels, "ignore_mismatched_sizes": bool(fresh)}
    settle_vector_functions()
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    if unused or fresh or (family is not None and family.output_layer is not None):
        logging.set_verbosity_error()  # it would list these, which are known, and say that T5's weights are not tied
    with reported(f"transformers cannot load {folder}"):
        loaded, report = loading_class.from_pretrained(
            folder,
            dtype=arithmetic,
            attn_implementation="eager",
            experts_implementation="eager",  # grouped products refuse rows that are no multiple of 16 bytes
            local_files_only=True,
            output_loading_info=True,
            **of_head,
        )
    logging.set_verbosity(verbosity)
    fresh_names = _names_of(loaded, fresh)
    known = {"unexpected_keys": set(unused), "missing_keys": fresh_names, "mismatched_keys": fresh_names}
    problems = {
        kind: sorted({str(name if isinstance(name, str) else name[0]) for name in names} - known.get(kind, set()))
        for kind, names in report.items()
    }
    if problems := {kind: names for kind, names in problems.items() if names}:
        raise ConversionError(f"transformers does not load {folder} cleanly: {problems}")
    reference: torch.nn.Module = loaded
    reference.load_state_dict(fresh, strict=False)
    if hasattr(loaded, "num_labels"):
        loaded.config.pad_token_id = None  # the last of the random tokens is classified, whichever it is
    return reference


def _names_of(model: torch.nn.Module, fresh: Mapping[str, Tensor]) -> set[str]:
    """All names that a model has for some of its tensors; tied ones have several."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    places = {tensors[name].data_ptr() for name in fresh}
    return {name for name, tensor in tensors.items() if tensor.data_ptr() in places}


@torch.no_grad()
def round_parameters(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Round every parameter in place to what a number format can hold."""
    if dtype != torch.float32:  # nothing is wider
        for parameter in module.parameters():
            parameter.copy_(parameter.to(dtype))


def compare_logits(reference: Tensor, logits: Tensor) -> Parity:
    """Measure how far two sets of logits are apart.

    Args:
        reference: `[b, s, v]`.
        logits: `[b, s, v]` or with padding columns beyond the true vocabulary, which are ignored.

    Raises:
        ConversionError: The shapes do not correspond.
    """
    if reference.shape[:-1] != logits.shape[:-1] or reference.shape[-1] > logits.shape[-1]:
        raise ConversionError(f"logits of shape {list(logits.shape)} against {list(reference.shape)}")
    reference = reference.float()
    logits = logits[..., : reference.shape[-1]].float()
    difference = (logits - reference).abs()
    # NaN and infinity are the worst difference there is, wherever they come from.
    difference = torch.where(difference.isfinite(), difference, torch.inf)
    sample, position, token_id = (int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
    largest = difference[sample, position, token_id].item()
    spread = reference.std().item()
    exceeding = (difference > fp32_tolerance(spread)).any(dim=-1).any(dim=0).nonzero()
    tiny = torch.finfo(torch.float32).tiny
    return Parity(
        max_abs_difference=largest,
        max_rel_difference=largest / max(reference.abs().max().item(), tiny),
        rms_rel_difference=difference.square().mean().sqrt().item() / max(spread, tiny),
        spread=spread,
        sample=sample,
        position=position,
        token_id=token_id,
        reference_logit=reference[sample, position, token_id].item(),
        logit=logits[sample, position, token_id].item(),
        first_position=int(exceeding[0]) if len(exceeding) else None,
        argmax_agreement=(reference.argmax(-1) == logits.argmax(-1)).float().mean().item(),
        num_positions=reference.shape[0] * reference.shape[1],
    )


def check_parity(reference: Tensor, logits: Tensor, *, arithmetic: torch.dtype) -> Parity:
    """Refuse a conversion whose two models compute different logits.

    Args:
        reference: transformers' logits, `[b, s, v]`.
        logits: Ours, `[b, s, v]` or with padding columns.
        arithmetic: Number format that both were computed in.

    Returns:
        The comparison, within tolerance.

    Raises:
        ConversionError: It is not; the message says how far, where, and what the tolerance is.
    """
    parity = compare_logits(reference, logits)
    if parity.is_within(arithmetic):
        return parity
    raise ConversionError(
        "the two models compute different logits: "
        f"{parity.describe()}; the largest is in sample {parity.sample}, position {parity.position}, token "
        f"{parity.token_id}: {parity.reference_logit:.6g} by transformers, {parity.logit:.6g} by megatron-core; "
        f"tolerated is {parity.tolerance(arithmetic)}",
        hint=_likely_cause(parity),
    )


def _likely_cause(parity: Parity) -> str:
    if parity.max_abs_difference == float("inf"):
        return "a logit is not finite: look for NaN in the weights"
    if parity.rms_rel_difference < 1e-2:
        return "the difference is small: compare norm epsilon, rotary base and scaling, and the number formats"
    if parity.first_position == 0:
        # The first token attends only to itself, whatever its query, key and rotation.
        return "it differs from the first position on: suspect embedding, values, output projection, MLP or norms"
    return f"it differs only from position {parity.first_position} on: suspect queries, keys or the rotary embedding"
