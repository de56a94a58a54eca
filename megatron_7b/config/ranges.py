"""The range of every number, as tables."""

from collections.abc import Callable, Iterator
from typing import cast

from megatron_7b.config.options import get_value
from megatron_7b.config.problems import Problem
from megatron_7b.config.rule import Case

AT_LEAST_ONE = (
    "model.num_layers",
    "model.hidden_size",
    "model.ffn_hidden_size",
    "model.num_attention_heads",
    "model.num_query_groups",
    "model.kv_channels",
    "model.vocab_size",
    "model.num_decoder_layers",
    "model.num_labels",
    "objective.masks_per_text",
    "objective.max_ngram",
    "objective.mean_span_length",
    "optimizer.muon_num_ns_steps",
    "model.make_vocab_size_divisible_by",
    "model.max_position_embeddings",
    "model.window_size",
    "model.rope_scaling.original_max_position_embeddings",
    "parallel.tensor_model_parallel_size",
    "parallel.pipeline_model_parallel_size",
    "parallel.virtual_pipeline_model_parallel_size",
    "parallel.context_parallel_size",
    "parallel.expert_model_parallel_size",
    "model.num_moe_experts",
    "model.moe_router_topk",
    "model.moe_ffn_hidden_size",
    "parallel.recompute_num_layers",
    "data.seq_length",
    "finetune.max_target_length",
    "training.train_steps",
    "training.micro_batch_size",
    "training.global_batch_size",
    "training.eval_steps",
    "training.max_consecutive_nonfinite_steps",
    "telemetry.log_interval_steps",
    "telemetry.eval_tasks_limit",
    "telemetry.eval_tasks_batch_size",
    "runtime.num_threads",
    "adapter.rank",
    "adapter.bottleneck_size",
    "adapter.initial_rank",
    "adapter.target_rank",
    "adapter.delta_t",
)
NOT_NEGATIVE = (
    "finetune.doc_stride",
    "model.init_method_std",
    "model.moe_aux_loss_coeff",
    "model.num_tokentypes",
    "optimizer.min_lr",
    "optimizer.weight_decay",
    "optimizer.clip_grad",
    "optimizer.lr_warmup_steps",
    "data.num_workers",
    "training.seed",
    "training.eval_interval_steps",
    "training.early_stop_validations",
    "telemetry.eval_tasks_interval_steps",
    "telemetry.eval_tasks_num_fewshot",
    "checkpoint.save_interval_steps",
    "checkpoint.keep_last",
    "adapter.tinit",
    "adapter.tfinal",
    "adapter.orth_reg_weight",
    "finetune.desirable_weight",
    "finetune.undesirable_weight",
)
POSITIVE = (
    "model.rotary_base",
    "model.norm_epsilon",
    "model.rope_scaling.factor",
    "model.rope_scaling.low_freq_factor",
    "model.rope_scaling.high_freq_factor",
    "optimizer.lr",
    "optimizer.adam_eps",
    "optimizer.muon_extra_scale_factor",
    "optimizer.muon_adamw_lr",
    "optimizer.lr_decay_steps",
    "optimizer.lr_wsd_decay_steps",
    "training.exit_after_seconds",
    "runtime.distributed_timeout_minutes",
    "adapter.alpha",
    "finetune.beta",
    "finetune.temperature",
    "distillation.temperature",
    "distillation.hidden_weight",
    "distillation.attention_weight",
)
FRACTIONS = (
    "model.hidden_dropout",
    "model.attention_dropout",
    "optimizer.adam_beta1",
    "optimizer.adam_beta2",
    "optimizer.sgd_momentum",
    "optimizer.muon_momentum",
    "optimizer.lr_warmup_fraction",
    "finetune.label_smoothing",
    "adapter.dropout",
)
OPEN_FRACTIONS = (
    "objective.masked_share",
    "objective.noise_density",
    "adapter.beta1",
    "adapter.beta2",
    "distillation.jsd_beta",
)
SHARES = ("objective.short_share", "data.fim_rate", "data.fim_spm_rate", "distillation.alpha")
MAX_SEED = 2**32 - 1
"""NumPy's limit, the tightest of the generators that are seeded."""


def find_out_of_range(case: Case) -> Iterator[Problem]:
    """Numbers outside of their range, whatever the others are."""
    ranges: list[tuple[tuple[str, ...], Callable[[float], bool], str]] = [
        (AT_LEAST_ONE, lambda value: value >= 1, "must be at least 1"),
        (NOT_NEGATIVE, lambda value: value >= 0, "must not be negative"),
        (POSITIVE, lambda value: value > 0, "must be above 0"),
        (FRACTIONS, lambda value: 0 <= value < 1, "must be at least 0 and below 1"),
        (OPEN_FRACTIONS, lambda value: 0 < value < 1, "must be above 0 and below 1"),
        (SHARES, lambda value: 0 <= value <= 1, "must be at least 0 and at most 1"),
        (("training.seed",), lambda value: value <= MAX_SEED, f"must be at most {MAX_SEED}"),
    ]
    for paths, is_allowed, message in ranges:
        for path in paths:
            value = get_value(case.config, path)
            if value is not None and not is_allowed(cast(float, value)):
                yield case.problem(path, message)
