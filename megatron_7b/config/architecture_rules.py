"""Rules for what an architecture has, and what its kind of model can be trained to do."""

from collections.abc import Iterator

from megatron_7b.config.architectures import ARCHITECTURES, others_with
from megatron_7b.config.objectives import OBJECTIVES
from megatron_7b.config.options import get_value, options
from megatron_7b.config.problems import Problem
from megatron_7b.config.rule import Case, Rule, adder_to

RULES: list[Rule] = []
rule = adder_to(RULES)

_ROTARY_OPTIONS = ("model.rotary_base", "model.rope_scaling")
_MASKED_OPTIONS = (
    *("objective.masked_share", "objective.max_ngram", "objective.whole_words", "objective.word_segmenter"),
    *("objective.masks_per_text", "objective.predict_word_before"),
    *("objective.samples", "objective.sentence_pairs", "objective.short_share"),
)
_CAUSAL_OPTIONS = ("data.reset_attention_mask", "data.reset_position_ids", "data.eod_mask_loss", "data.fim_rate")
_FRAME_TOKENS = {"none": 2, "next_sentence": 3, "sentence_order": 3}
"""[CLS] and [SEP] around the text of a masked sample, by what it is of objective.sentence_pairs."""
_SPAN_OPTIONS = ("objective.noise_density", "objective.mean_span_length")
_ENCODER_DECODER_OPTIONS = (
    "model.num_decoder_layers",
    "model.relative_attention_num_buckets",
    "model.relative_attention_max_distance",
    "model.scale_output_states",
)
_FEWEST_BUCKETS = 4
_FEWEST_CORRUPTED = 3
"""A token of text, a sentinel and the end: the shortest text that a span is missing from."""


def _is_default(case: Case, path: str) -> bool:
    return bool(get_value(case.config, path) == options()[path].default)


@rule("model.architecture", "model.add_qkv_bias", "model.qk_layernorm")
def _architecture_fixes_options(case: Case) -> Iterator[Problem]:
    model = case.config.model
    for name, needed in ARCHITECTURES[model.architecture].fixed.items():
        given = getattr(model, name)
        if given != needed:
            others = others_with(model.architecture, name, given)
            yield case.problem(
                f"model.{name}",
                f"must be {needed} for Hugging Face's {model.architecture}"
                + (f"; it is {given} in {', '.join(others)}" if others else ""),
            )


@rule("model.architecture", "model.num_query_groups", "model.num_attention_heads")
def _architecture_has_query_groups(case: Case) -> Iterator[Problem]:
    model = case.config.model
    if not model.traits.has_query_groups and model.query_groups != model.num_attention_heads:
        yield case.problem(
            "model.num_query_groups",
            f"must be none in {model.architecture}, whose heads all have keys and values of their own",
        )


@rule("model.architecture", "model.kv_channels", "model.num_attention_heads", "model.hidden_size")
def _architecture_has_wide_heads(case: Case) -> Iterator[Problem]:
    model = case.config.model
    width = model.head_width * model.num_attention_heads
    is_free = model.traits.has_query_groups or model.traits.has_wide_heads
    if not is_free and model.kv_channels is not None and width != model.hidden_size:
        yield case.problem(
            "model.kv_channels",
            f"must be none in {model.architecture}, whose heads share model.hidden_size = {model.hidden_size}",
        )


@rule("model.architecture", *_ROTARY_OPTIONS)
def _architecture_turns_positions(case: Case) -> Iterator[Problem]:
    model = case.config.model
    if model.traits.position_embedding_type == "rope":
        return
    for path in _ROTARY_OPTIONS:
        if not _is_default(case, path):
            yield case.problem(path, f"only applies to rotary embeddings; {model.architecture} learns its positions")


@rule("model.architecture", *_ENCODER_DECODER_OPTIONS)
def _encoder_decoder_options_are_used(case: Case) -> Iterator[Problem]:
    model = case.config.model
    if model.traits.kind == "encoder_decoder":
        return
    for path in _ENCODER_DECODER_OPTIONS:
        if not _is_default(case, path):
            yield case.problem(path, f"only applies to encoder-decoders such as t5, not to {model.architecture}")


@rule("model.architecture", "model.relative_attention_num_buckets", "model.relative_attention_max_distance")
def _buckets_tell_distances_apart(case: Case) -> Iterator[Problem]:
    model = case.config.model
    buckets, exact = model.relative_attention_num_buckets, model.relative_attention_num_buckets // 2
    if model.traits.position_embedding_type != "relative":
        return
    if buckets < _FEWEST_BUCKETS:
        yield case.problem(
            "model.relative_attention_num_buckets",
            f"must be at least {_FEWEST_BUCKETS}: half of an encoder's are for each direction, half of these for "
            "single distances",
        )
    elif model.relative_attention_max_distance <= exact:
        yield case.problem(
            "model.relative_attention_max_distance",
            f"must be above model.relative_attention_num_buckets / 2 = {exact}, which are for single distances",
        )


@rule("model.architecture", "model.init_method_std")
def _every_matrix_has_a_spread(case: Case) -> Iterator[Problem]:
    model = case.config.model
    if model.traits.kind == "encoder_decoder" and not _is_default(case, "model.init_method_std"):
        yield case.problem(
            "model.init_method_std",
            f"does not apply to {model.architecture}, whose initial weights follow from the width of each matrix",
        )


@rule("model.architecture", "model.num_tokentypes")
def _architecture_has_tokentypes(case: Case) -> Iterator[Problem]:
    model = case.config.model
    if model.num_tokentypes and not model.traits.has_tokentypes:
        having = [name for name, traits in ARCHITECTURES.items() if traits.has_tokentypes]
        yield case.problem(
            "model.num_tokentypes", f"must be 0 in {model.architecture}; only {', '.join(having)} have them"
        )
    elif model.traits.has_tokentypes and not model.num_tokentypes:
        yield case.problem("model.num_tokentypes", f"must be at least 1 in {model.architecture}; BERT has 2")


@rule("model.architecture", "objective.name")
def _objective_fits_the_kind(case: Case) -> Iterator[Problem]:
    kind, name = case.config.model.traits.kind, case.config.objective.name
    if name is not None and kind not in OBJECTIVES[name]:
        fitting = [other for other, kinds in OBJECTIVES.items() if kind in kinds]
        yield case.problem(
            "objective.name",
            f"trains a model of kind {' or '.join(OBJECTIVES[name])}; model.architecture = "
            f"{case.config.model.architecture} is of kind {kind}, which is trained by {' or '.join(fitting)}",
        )


@rule("model.architecture", "objective.name", *_MASKED_OPTIONS)
def _masking_options_are_used(case: Case) -> Iterator[Problem]:
    if case.config.objective_name == "masked":
        return
    for path in _MASKED_OPTIONS:
        if not _is_default(case, path):
            yield case.problem(path, "only applies with the objective masked, which trains encoders such as bert")


@rule("model.architecture", "objective.name", *_SPAN_OPTIONS)
def _span_options_are_used(case: Case) -> Iterator[Problem]:
    if case.config.objective_name == "span":
        return
    for path in _SPAN_OPTIONS:
        if not _is_default(case, path):
            yield case.problem(path, "only applies with the objective span, which trains encoder-decoders such as t5")


@rule("model.architecture", "objective.name", *_CAUSAL_OPTIONS)
def _samples_of_masked_text_are_whole(case: Case) -> Iterator[Problem]:
    name = case.config.objective_name
    if name not in ("masked", "span"):
        return
    for path in _CAUSAL_OPTIONS:
        if not _is_default(case, path):
            yield case.problem(
                path, f"does not apply to the objective {name}, where every sample is a text of its own: leave it out"
            )


@rule("model.architecture", "objective.name", "objective.sentence_pairs", "data.seq_length")
def _frame_leaves_room_for_text(case: Case) -> Iterator[Problem]:
    objective = case.config.objective
    frame, texts = _FRAME_TOKENS[objective.sentence_pairs], 1 if objective.sentence_pairs == "none" else 2
    if case.config.objective_name == "masked" and case.config.data.seq_length < frame + texts:
        yield case.problem("data.seq_length", f"must be at least {frame + texts}: [CLS] and [SEP] enclose the text")
    if case.config.objective_name == "span" and case.config.data.seq_length < _FEWEST_CORRUPTED:
        yield case.problem(
            "data.seq_length", f"must be at least {_FEWEST_CORRUPTED}: a token of text, a sentinel and the end of text"
        )


@rule("model.architecture", "model.add_binary_head", "model.num_tokentypes", "objective.sentence_pairs")
def _pairs_have_a_head_and_types(case: Case) -> Iterator[Problem]:
    model, pairs = case.config.model, case.config.objective.sentence_pairs
    if model.add_binary_head and model.traits.kind != "encoder":
        yield case.problem("model.add_binary_head", f"must be False in {model.architecture}, which is no encoder")
    if pairs == "none" or model.traits.kind != "encoder":
        return
    if not model.add_binary_head:
        yield case.problem(
            "model.add_binary_head", f"must be True, or left out, with objective.sentence_pairs = {pairs}"
        )
    if model.num_tokentypes < 2:
        yield case.problem("model.num_tokentypes", "must be at least 2 to tell the sentences of a pair apart")


@rule("objective.masks_per_text", "objective.masked_share")
def _masks_of_a_text_are_disjoint(case: Case) -> Iterator[Problem]:
    count, share = case.config.objective.masks_per_text, case.config.objective.masked_share
    if count > 1 and count * share > 1:
        yield case.problem(
            "objective.masks_per_text",
            f"must be at most {int(1 / share)} with objective.masked_share = {share}: no word is hidden twice",
        )


@rule("objective.word_segmenter", "objective.whole_words")
def _segmenter_is_for_whole_words(case: Case) -> Iterator[Problem]:
    objective = case.config.objective
    if objective.word_segmenter != "none" and not objective.whole_words:
        yield case.problem("objective.word_segmenter", "only applies with objective.whole_words True")


@rule("model.architecture", "parallel.context_parallel_size")
def _encoders_see_whole_sequences(case: Case) -> Iterator[Problem]:
    size, model = case.config.parallel.context_parallel_size, case.config.model
    if size > 1 and model.traits.kind in ("encoder", "encoder_decoder"):
        yield case.problem(
            "parallel.context_parallel_size",
            f"must be 1 for encoders such as {model.architecture}, whose samples are short: use tensor or data "
            "parallelism",
        )


@rule("model.architecture", "precision.fp8")
def _encoder_decoders_have_any_lengths(case: Case) -> Iterator[Problem]:
    fp8, model = case.config.precision.fp8, case.config.model
    if fp8 != "none" and model.traits.kind == "encoder_decoder":
        yield case.problem(
            "precision.fp8",
            f"must be none for {model.architecture}, whose answers have lengths that FP8 products do not take: "
            "use BF16",
        )


@rule("model.architecture", "parallel.pipeline_model_parallel_size")
def _encoder_decoders_have_one_stage(case: Case) -> Iterator[Problem]:
    size, model = case.config.parallel.pipeline_model_parallel_size, case.config.model
    if size > 1 and model.traits.kind == "encoder_decoder":
        yield case.problem(
            "parallel.pipeline_model_parallel_size",
            f"must be 1 for {model.architecture}, as megatron-core has no pipeline in which every stage of the decoder "
            "gets the encoder's states: use tensor or data parallelism",
        )
