"""Each impossible combination is refused at the option to change, and nothing else is said."""

import re

import pytest

from megatron_7b.config import check_config, load_config, save_config
from megatron_7b.config.architecture_rules import RULES as ARCHITECTURE_RULES
from megatron_7b.config.conflicts import find_conflicts
from megatron_7b.config.distillation_rules import FILE_RULES as DISTILLATION_FILE_RULES
from megatron_7b.config.distillation_rules import RULES as DISTILLATION_RULES
from megatron_7b.config.evaluation_rules import RULES as EVALUATION_RULES
from megatron_7b.config.expert_rules import RULES as EXPERT_RULES
from megatron_7b.config.model_rules import RULES as MODEL_RULES
from megatron_7b.config.optimizer_config import OptimizerConfig
from megatron_7b.config.optimizer_rules import RULES as OPTIMIZER_RULES
from megatron_7b.config.optimizers import OPTIMIZERS
from megatron_7b.config.options import options
from megatron_7b.config.ranges import AT_LEAST_ONE, FRACTIONS, NOT_NEGATIVE, POSITIVE, SHARES
from megatron_7b.config.rule import Case
from megatron_7b.config.run_rules import FILE_RULES
from megatron_7b.config.run_rules import RULES as RUN_RULES
from megatron_7b.config.schema import RunConfig
from megatron_7b.config.window_rules import RULES as WINDOW_RULES
from megatron_7b.errors import ConfigError

TP, PP, CP = (f"parallel.{name}_parallel_size" for name in ("tensor_model", "pipeline_model", "context"))
EP = "parallel.expert_model_parallel_size"
STAGES = "parallel.pipeline_model_parallel_layout"
VP = "parallel.virtual_pipeline_model_parallel_size"
SHARDED = "parallel.use_distributed_optimizer"

RULES = [
    *MODEL_RULES,
    *ARCHITECTURE_RULES,
    *DISTILLATION_RULES,
    *EXPERT_RULES,
    *OPTIMIZER_RULES,
    *RUN_RULES,
    *EVALUATION_RULES,
    *WINDOW_RULES,
]
BERT = {"model.architecture": "bert", "model.num_tokentypes": 2}
GPT2 = {"model.architecture": "gpt2"}
SELECTIVE = {"parallel.recompute_granularity": "selective"}
GRAPHS = "runtime.cuda_graph_impl"
HOST = "optimizer.cpu_offload"
LOSS = "runtime.cross_entropy_impl"
MODULES = "parallel.recompute_modules"
MOE = {"model.architecture": "mixtral", "model.num_moe_experts": 4}
T5 = {"model.architecture": "t5"}
TAUGHT = {"distillation.teacher": "T"}
OWN = "distillation.teacher_tensor_model_parallel_size"
QWEN2 = {"model.architecture": "qwen2", "model.add_qkv_bias": True}
WINDOW, WINDOWED = "model.window_size", "model.window_attn_skip_freq"
PAIRS = {"objective.sentence_pairs": "next_sentence"}

# The defaults that these change: 4 layers, hidden 256, ffn 688, 8 heads, sequence 256 of at most 2048, micro batch 4,
# global batch 16, learning rate 3e-4 to 3e-5, 100 steps.
CASES = [
    ({"telemetry.profile_steps": "ten"}, 1, "telemetry.profile_steps", "such as 10 or 10-12"),
    ({"telemetry.profile_steps": "0-2"}, 1, "telemetry.profile_steps", "the first step of a run is step 1"),
    ({"telemetry.profile_steps": "12-10"}, 1, "telemetry.profile_steps", "did you mean 10-12?"),
    (
        {"telemetry.profile_steps": "10-40"},
        1,
        "telemetry.profile_steps",
        "has 31 steps, and a profile holds at most 10",
    ),
    ({"telemetry.profile_steps": "99-101"}, 1, "telemetry.profile_steps", "the run ends with step 100"),
    ({"telemetry.profile_ranks": (0, 2)}, 2, "telemetry.profile_ranks", "there is no rank 2: ranks are 0 to 1"),
    ({"telemetry.profile_ranks": ()}, 1, "telemetry.profile_ranks", "name at least one rank"),
    ({"distillation.alpha": 0.9}, 1, "distillation.alpha", "only applies with distillation.teacher"),
    ({**TAUGHT, OWN: 3, TP: 2}, 4, OWN, "must be a multiple of parallel.tensor_model_parallel_size = 2"),
    ({**TAUGHT, OWN: 3}, 4, OWN, "is shared by 3 replicas of the student, which must divide the 4 that there are"),
    ({**TAUGHT, OWN: 2, CP: 2}, 4, OWN, "needs parallel.context_parallel_size 1"),
    ({**TAUGHT, OWN: 2, "distillation.hidden": True}, 2, OWN, "layers are compared rank by rank"),
    ({**TAUGHT, OWN: 2, **BERT}, 2, OWN, "only applies to decoders that predict tokens"),
    ({**TAUGHT, "distillation.jsd_beta": 0.3}, 1, "distillation.jsd_beta", "only applies with distillation.loss jsd"),
    ({**TAUGHT, "distillation.cached_logits": "P"}, 1, "distillation.cached_logits", "takes the place of"),
    (
        {"distillation.cached_logits": "P", "distillation.teacher_dtype": "bf16"},
        1,
        "distillation.teacher_dtype",
        "only applies with distillation.teacher",
    ),
    ({"distillation.cached_logits": "P", CP: 2}, 2, "distillation.cached_logits", "needs parallel.context_parallel"),
    (
        {"distillation.cached_logits": "P", "objective.name": "chat"},
        1,
        "distillation.cached_logits",
        "only applies with the objective causal",
    ),
    ({**TAUGHT, **T5}, 1, "distillation.teacher", "and question_answering, not span"),
    (
        {"distillation.cached_logits": "P", "distillation.hidden": True},
        1,
        "distillation.hidden",
        "only applies with distillation.teacher",
    ),
    (
        {**TAUGHT, "distillation.hidden_weight": 2.0},
        1,
        "distillation.hidden_weight",
        "only applies with distillation.hidden",
    ),
    (
        {**TAUGHT, **BERT, "distillation.attention_weight": 2.0},
        1,
        "distillation.attention_weight",
        "only applies with distillation.attention kl or scores",
    ),
    (
        {**TAUGHT, "distillation.layer_map": (1, 2, 3, 4)},
        1,
        "distillation.layer_map",
        "only applies with distillation.hidden or distillation.attention",
    ),
    ({**TAUGHT, "distillation.attention": "kl"}, 1, "distillation.attention", "not to a model of kind decoder"),
    (
        {**TAUGHT, "distillation.hidden": True, "adapter.method": "lora"},
        1,
        "distillation.hidden",
        "needs a model that is trained as a whole",
    ),
    (
        {**TAUGHT, "distillation.hidden": True, "parallel.recompute_granularity": "full"},
        1,
        "distillation.hidden",
        "needs parallel.recompute_granularity none or selective",
    ),
    (
        {**TAUGHT, **BERT, "distillation.attention": "kl", "parallel.recompute_granularity": "selective"},
        1,
        "distillation.attention",
        "needs parallel.recompute_granularity none",
    ),
    (
        {**TAUGHT, "objective.name": "chat", "finetune.task": "chat", "finetune.label_smoothing": 0.1},
        1,
        "finetune.label_smoothing",
        "must be 0 with distillation.teacher",
    ),
    ({"objective.name": "chat", CP: 2}, 2, CP, "must be 1 in fine-tuning"),
    (
        {"adapter.method": "adalora", "training.early_stop_validations": 2, "checkpoint.keep_best": "validation_loss"},
        1,
        "training.early_stop_validations",
        "ranks fall until the last step",
    ),
    ({"checkpoint.keep_best": "eval/arc_easy/acc"}, 1, "checkpoint.keep_best", "needs telemetry.eval_tasks"),
    ({"telemetry.eval_tasks": ["a"], **BERT}, 1, "telemetry.eval_tasks", "measured on decoders"),
    (
        {"telemetry.eval_tasks": ["a"], PP: 2, VP: 2},
        2,
        "telemetry.eval_tasks",
        "tasks cannot be measured during a run with parallel.virtual",
    ),
    ({"telemetry.eval_tasks_limit": 5}, 1, "telemetry.eval_tasks_limit", "only applies with telemetry.eval_tasks"),
    ({"training.early_stop_validations": 2}, 1, "training.early_stop_validations", "needs checkpoint.keep_best"),
    ({"model.num_attention_heads": 7}, 1, "model.num_attention_heads", "must divide model.hidden_size = 256"),
    ({"model.hidden_size": 264}, 1, "model.num_attention_heads", "33 wide"),
    ({"model.kv_channels": 31}, 1, "model.kv_channels", "31 wide"),
    ({"model.num_query_groups": 3}, 1, "model.num_query_groups", "nearest: 2 or 4"),
    (
        {"model.add_qkv_bias": True},
        1,
        "model.add_qkv_bias",
        "llama; it is True in qwen2",
    ),
    ({"model.architecture": "qwen2"}, 1, "model.add_qkv_bias", "must be True for Hugging Face's qwen2"),
    ({"model.architecture": "qwen3"}, 1, "model.qk_layernorm", "must be True for Hugging Face's qwen3"),
    ({**BERT, "model.add_qkv_bias": True}, 1, "model.add_qkv_bias", "must be False for Hugging Face's bert"),
    ({**BERT, "model.num_query_groups": 4}, 1, "model.num_query_groups", "must be none in bert"),
    ({**GPT2, "model.num_query_groups": 4}, 1, "model.num_query_groups", "must be none in gpt2"),
    ({**GPT2, "model.kv_channels": 64}, 1, "model.kv_channels", "must be none in gpt2"),
    ({**GPT2, "model.rotary_base": 500.0}, 1, "model.rotary_base", "only applies to rotary embeddings"),
    ({**BERT, "model.rope_scaling": "{}"}, 1, "model.rope_scaling", "only applies to rotary embeddings"),
    ({"model.num_tokentypes": 2}, 1, "model.num_tokentypes", "must be 0 in llama; only bert, megatron-bert have them"),
    ({"model.architecture": "bert"}, 1, "model.num_tokentypes", "must be at least 1 in bert"),
    ({**BERT, "objective.name": "causal"}, 1, "objective.name", "bert is of kind encoder, which is trained by masked"),
    ({"objective.name": "masked"}, 1, "objective.name", "llama is of kind decoder, which is trained by causal"),
    ({"objective.masked_share": 0.3}, 1, "objective.masked_share", "only applies with the objective masked"),
    ({**BERT, "objective.masked_share": 1.0}, 1, "objective.masked_share", "above 0 and below 1"),
    ({**BERT, "data.reset_attention_mask": True}, 1, "data.reset_attention_mask", "every sample is a text of its own"),
    ({**BERT, "data.eod_mask_loss": True}, 1, "data.eod_mask_loss", "does not apply to the objective masked"),
    ({**BERT, "data.fim_rate": 0.5}, 1, "data.fim_rate", "does not apply to the objective masked"),
    ({**BERT, "data.seq_length": 2}, 1, "data.seq_length", "must be at least 3"),
    ({**BERT, **PAIRS, "data.seq_length": 4}, 1, "data.seq_length", "must be at least 5"),
    ({**BERT, **PAIRS, "model.num_tokentypes": 1}, 1, "model.num_tokentypes", "to tell the sentences of a pair apart"),
    ({**BERT, **PAIRS, "model.add_binary_head": False}, 1, "model.add_binary_head", "must be True, or left out"),
    ({"model.add_binary_head": True}, 1, "model.add_binary_head", "must be False in llama"),
    (
        {"objective.sentence_pairs": "sentence_order"},
        1,
        "objective.sentence_pairs",
        "only applies with the objective masked",
    ),
    ({**BERT, "objective.short_share": 1.5}, 1, "objective.short_share", "at most 1"),
    ({**BERT, "objective.masks_per_text": 7}, 1, "objective.masks_per_text", "must be at most 6"),
    (
        {**BERT, "objective.word_segmenter": "jieba", "objective.whole_words": False},
        1,
        "objective.word_segmenter",
        "True",
    ),
    ({**BERT, CP: 2}, 2, CP, "must be 1 for encoders such as bert"),
    ({"model.rope_scaling.low_freq_factor": 4}, 1, "model.rope_scaling.low_freq_factor", "must be below"),
    ({"data.seq_length": 4096}, 1, "data.seq_length", "at most model.max_position_embeddings = 2048"),
    ({TP: 2}, 3, "number of ranks", "2 * 1 * 1 = 2; nearest: 2 or 4"),
    ({TP: 2, "model.num_query_groups": 1}, 2, TP, "must divide model.num_query_groups = 1"),
    ({**T5, PP: 2}, 2, PP, "must be 1 for t5, as megatron-core has no pipeline in which every stage"),
    ({**T5, "precision.fp8": "hybrid"}, 1, "precision.fp8", "must be none for t5"),
    ({**T5, CP: 2}, 2, CP, "must be 1 for encoders such as t5"),
    ({**T5, "model.init_method_std": 0.01}, 1, "model.init_method_std", "follow from the width of each matrix"),
    ({**T5, "model.relative_attention_num_buckets": 3}, 1, "model.relative_attention_num_buckets", "at least 4"),
    (
        {**T5, "model.relative_attention_max_distance": 16},
        1,
        "model.relative_attention_max_distance",
        "above model.relative_attention_num_buckets / 2 = 16",
    ),
    ({"model.num_decoder_layers": 2}, 1, "model.num_decoder_layers", "encoder-decoders such as t5, not to llama"),
    ({**T5, "data.seq_length": 2}, 1, "data.seq_length", "at least 3"),
    ({**T5, "data.fim_rate": 0.5}, 1, "data.fim_rate", "does not apply to the objective span"),
    (
        {**T5, "objective.name": "masked"},
        1,
        "objective.name",
        "t5 is of kind encoder_decoder, which is trained by span",
    ),
    ({"objective.noise_density": 0.3}, 1, "objective.noise_density", "only applies with the objective span"),
    ({**T5, "objective.mean_span_length": 0.5}, 1, "objective.mean_span_length", "at least 1"),
    ({WINDOW: 64}, 1, WINDOW, "must be none in llama; only mistral, qwen2, qwen3, mixtral, qwen3_moe have windows"),
    ({**GPT2, WINDOW: 64}, 1, WINDOW, "must be none in gpt2"),
    ({**QWEN2, WINDOW: 0}, 1, WINDOW, "must be at least 1"),
    ({**QWEN2, WINDOW: 2048}, 1, WINDOW, "must be below model.max_position_embeddings = 2048"),
    ({**QWEN2, WINDOWED: (2,)}, 1, WINDOWED, "only applies with model.window_size"),
    (
        {"model.architecture": "mistral", WINDOW: 64, WINDOWED: (2,)},
        1,
        WINDOWED,
        "must be left out in mistral, whose layers all have the window; qwen2 and qwen3 may have others",
    ),
    ({**QWEN2, WINDOW: 64, WINDOWED: (1,)}, 1, WINDOWED, "a number N from 2 to model.num_layers = 4"),
    ({**QWEN2, WINDOW: 64, WINDOWED: (5,)}, 1, WINDOWED, "a number N from 2 to model.num_layers = 4"),
    ({**QWEN2, WINDOW: 64, WINDOWED: (1, 0, 1)}, 1, WINDOWED, "or model.num_layers = 4 numbers"),
    ({**QWEN2, WINDOW: 64, WINDOWED: (1, 2, 0, 0)}, 1, WINDOWED, "1 for each layer with a window"),
    ({**QWEN2, WINDOW: 64, WINDOWED: (1, 1, 1, 1)}, 1, WINDOWED, "both of which there are"),
    (
        {**QWEN2, WINDOW: 64, CP: 2, "model.transformer_impl": "transformer_engine", "runtime.device": "cuda"},
        2,
        WINDOW,
        "Transformer Engine's ranks pass keys on, which has no windows",
    ),
    ({"model.architecture": "mixtral"}, 1, "model.num_moe_experts", "must be given for mixtral"),
    ({"model.num_moe_experts": 4}, 1, "model.num_moe_experts", "only mixtral, qwen3_moe have experts"),
    ({EP: 2}, 2, EP, "only applies to mixtures of experts, not to llama"),
    ({**MOE, "model.moe_router_topk": 5}, 1, "model.moe_router_topk", "at most model.num_moe_experts = 4"),
    (
        {**MOE, "model.moe_router_topk": 1},
        1,
        "model.moe_router_topk",
        "must be at least 2: a single expert always weighs 1",
    ),
    ({**MOE, EP: 3, "training.global_batch_size": 12}, 3, EP, "must divide model.num_moe_experts = 4; nearest: 2 or 4"),
    ({**MOE, EP: 4}, 2, EP, "must divide the data- and context-parallel ranks, of which there are 2"),
    ({**MOE, "model.moe_ffn_hidden_size": 99, TP: 2}, 2, TP, "must divide model.moe_ffn_hidden_size = 99"),
    ({**MOE, "adapter.method": "lora"}, 1, "adapter.method", "must be none for a mixture of experts"),
    ({**MOE, "optimizer.name": "muon"}, 1, "optimizer.name", "must be adamw, adam or sgd for a mixture"),
    ({**MOE, "precision.fp8": "hybrid"}, 1, "precision.fp8", "must be none for a mixture of experts"),
    ({TP: 8, "model.ffn_hidden_size": 684}, 8, TP, "must divide model.ffn_hidden_size = 684"),
    ({"parallel.sequence_parallel": True}, 1, "parallel.sequence_parallel", "above 1"),
    ({"parallel.sequence_parallel": True, TP: 2, "data.seq_length": 255}, 2, "data.seq_length", "nearest: 254 or 256"),
    ({CP: 2, "data.seq_length": 254}, 2, "data.seq_length", "nearest: 252 or 256"),
    ({PP: 5}, 5, PP, "must be at most model.num_layers = 4"),
    ({PP: 2, VP: 4}, 2, PP, "must be at most model.num_layers = 4"),
    ({**BERT, PP: 3}, 3, PP, "must divide model.num_layers = 4 in bert; only the stages of decoders"),
    ({PP: 3, STAGES: (1, 1, 1)}, 3, STAGES, "add up to model.num_layers = 4, one for each stage; if left out: 1, 2, 1"),
    ({PP: 2, STAGES: (4, 0)}, 2, STAGES, "must be 2 numbers of at least 1"),
    ({STAGES: (4,)}, 1, STAGES, "needs parallel.pipeline_model_parallel_size above 1"),
    ({**BERT, PP: 2, STAGES: (1, 3)}, 2, STAGES, "only applies to decoders"),
    ({VP: 2}, 1, VP, "above 1"),
    ({PP: 2, VP: 1}, 2, VP, "at least 2"),
    (
        {CP: 2, "data.reset_attention_mask": True, "runtime.device": "cuda"},
        2,
        "data.reset_attention_mask",
        "documents are cut apart",
    ),
    ({"data.max_epochs": (1, -2)}, 1, "data.max_epochs", "must not be negative"),
    ({"data.max_epochs": (1, 2), "data.train": ("1", "a", "2", "b", "3", "c")}, 1, "data.max_epochs", "of the 3 sets"),
    ({"data.reset_position_ids": True}, 1, "data.reset_position_ids", "needs data.reset_attention_mask True"),
    ({"parallel.overlap_param_gather": True}, 1, "parallel.overlap_param_gather", SHARDED),
    ({"parallel.overlap_param_gather": True, SHARDED: True}, 1, "parallel.overlap_param_gather", "overlap_grad_reduce"),
    (
        {"parallel.recompute_granularity": "full", "parallel.recompute_num_layers": 3, PP: 2},
        2,
        "parallel.recompute_num_layers",
        "at most 2",
    ),
    ({"parallel.recompute_num_layers": 2}, 1, "parallel.recompute_num_layers", "only applies"),
    ({"parallel.recompute_method": "block"}, 1, "parallel.recompute_method", "only applies"),
    ({MODULES: ("mlp",)}, 1, MODULES, "only applies with parallel.recompute_granularity selective"),
    ({**SELECTIVE, MODULES: ("mlp", "norm")}, 1, MODULES, "norm: expected some of core_attn, mlp, moe"),
    ({**SELECTIVE, MODULES: ()}, 1, MODULES, "expected some of core_attn"),
    ({**SELECTIVE, MODULES: ("moe",)}, 1, MODULES, "needs a mixture of experts"),
    ({**MOE, **SELECTIVE, MODULES: ("mlp",)}, 1, MODULES, "moe is its own"),
    ({**SELECTIVE, MODULES: ("mlp",), "model.architecture": "gpt2"}, 1, MODULES, "without biases, not gpt2"),
    (
        {"model.transformer_impl": "transformer_engine", "runtime.device": "cpu"},
        1,
        "model.transformer_impl",
        "no CPU kernels",
    ),
    ({GRAPHS: "local", "runtime.device": "cpu"}, 1, GRAPHS, "no CPU kernels"),
    ({GRAPHS: "local", "model.transformer_impl": "local"}, 1, GRAPHS, "needs Transformer Engine"),
    ({GRAPHS: "local", "parallel.recompute_granularity": "full"}, 1, GRAPHS, "graphs hold whole layers"),
    ({GRAPHS: "local", "data.reset_attention_mask": True}, 1, GRAPHS, "other documents"),
    ({**MOE, GRAPHS: "local"}, 1, GRAPHS, "without experts, not mixtral"),
    ({HOST: True, "optimizer.name": "sgd"}, 1, HOST, "needs optimizer.name adamw | adam, not sgd"),
    ({HOST: True, "adapter.method": "lora"}, 1, HOST, "whose state is small"),
    ({HOST: True, "precision.optimizer_state_dtype": "bf16", SHARDED: True}, 1, HOST, "fp32: Transformer Engine's"),
    ({LOSS: "te", "runtime.device": "cpu"}, 1, LOSS, "no CPU kernels"),
    ({LOSS: "te", "model.transformer_impl": "local"}, 1, LOSS, "needs Transformer Engine"),
    ({LOSS: "full", **BERT}, 1, LOSS, "chunked for a model of kind encoder"),
    ({LOSS: "full", "distillation.cached_logits": "F"}, 1, LOSS, "label_smoothing or a teacher"),
    ({GRAPHS: "local", "adapter.method": "lora"}, 1, GRAPHS, "needs adapter.method none"),
    ({"precision.fp8": "hybrid", "precision.params_dtype": "fp32"}, 1, "precision.params_dtype", "works on bf16"),
    ({"precision.fp8": "hybrid", "model.transformer_impl": "local"}, 1, "precision.fp8", "needs Transformer Engine"),
    ({"precision.fp8": "hybrid", "runtime.device": "cpu"}, 1, "precision.fp8", "no CPU kernels"),
    ({"precision.fp8_param_gather": True, SHARDED: True}, 1, "precision.fp8_param_gather", "hybrid or e4m3"),
    ({"precision.fp8_param_gather": True, "precision.fp8": "hybrid"}, 1, "precision.fp8_param_gather", SHARDED),
    (
        {
            "precision.fp8_param_gather": True,
            "precision.fp8": "hybrid",
            "precision.fp8_recipe": "mxfp8",
            "model.ffn_hidden_size": 704,
            SHARDED: True,
        },
        1,
        "precision.fp8_param_gather",
        "tensorwise or blockwise",
    ),
    ({"precision.fp8": "hybrid", "model.ffn_hidden_size": 680}, 1, "model.ffn_hidden_size", "nearest: 672 or 688"),
    (
        {"precision.fp8": "hybrid", "data.seq_length": 250, "training.micro_batch_size": 1},
        1,
        "data.seq_length",
        "multiple of 16",
    ),
    ({"precision.optimizer_state_dtype": "bf16"}, 1, "precision.optimizer_state_dtype", SHARDED),
    (
        {"precision.optimizer_state_dtype": "bf16", SHARDED: True, "model.transformer_impl": "local"},
        1,
        "precision.optimizer_state_dtype",
        "Transformer Engine's optimizer",
    ),
    ({"training.global_batch_size": 18}, 1, "training.global_batch_size", "nearest: 16 or 20"),
    ({}, 8, "training.global_batch_size", "4 * 8 = 32; nearest: 32"),
    ({PP: 2, VP: 2, "training.global_batch_size": 12}, 2, "training.global_batch_size", "makes 3 microbatches"),
    ({"training.rampup_batch_size": (0, 4, 100)}, 1, "training.rampup_batch_size", "at least 1"),
    ({"training.rampup_batch_size": (20, 4, 100)}, 1, "training.rampup_batch_size", "must start below"),
    ({"training.rampup_batch_size": (4, 8, 100)}, 1, "training.rampup_batch_size", "nearest increment: 6 or 12"),
    ({"training.rampup_batch_size": (2, 2, 100)}, 1, "training.rampup_batch_size", "multiples of 4"),
    ({PP: 2, VP: 2, "training.rampup_batch_size": (4, 4, 99)}, 2, "training.rampup_batch_size", "multiples of 8"),
    ({"optimizer.min_lr": 1}, 1, "optimizer.min_lr", "at most optimizer.lr"),
    (
        {"optimizer.name": "sgd", "optimizer.sgd_momentum": 0, "optimizer.sgd_nesterov": True},
        1,
        "optimizer.sgd_nesterov",
        "needs optimizer.sgd_momentum above 0",
    ),
    (
        {"optimizer.name": "muon", "precision.optimizer_state_dtype": "bf16", SHARDED: True},
        1,
        "precision.optimizer_state_dtype",
        "needs optimizer.name adamw | adam, not muon",
    ),
    ({"optimizer.lr_warmup_steps": 9, "optimizer.lr_decay_steps": 9}, 1, "optimizer.lr_warmup_steps", "must be below"),
    ({"optimizer.lr_wsd_decay_steps": 10}, 1, "optimizer.lr_wsd_decay_steps", "only applies"),
    (
        {"optimizer.lr_decay_style": "wsd", "optimizer.lr_wsd_decay_steps": 95, "optimizer.lr_warmup_steps": 10},
        1,
        "optimizer.lr_wsd_decay_steps",
        "at most 90",
    ),
    ({"optimizer.lr_warmup_fraction": 1.0}, 1, "optimizer.lr_warmup_fraction", "below 1"),
    ({"finetune.label_smoothing": 0.1}, 1, "finetune.label_smoothing", "only applies with finetune.task chat"),
    ({"data.split": "98;2"}, 1, "data.split", "expected shares"),
    ({"data.split": "0,1,1"}, 1, "data.split", "expected shares"),
    ({"data.split": "1,nan"}, 1, "data.split", "expected shares"),
    ({"data.split": "1,1,1,1"}, 1, "data.split", "expected shares"),
    ({"data.train": ("A", "B", "C")}, 1, "data.train", "weights and prefixes in turn"),
    ({"data.train": ("A", "B")}, 1, "data.train", "a weight before each prefix"),
    ({"data.valid": ("0", "B")}, 1, "data.valid", "above 0"),
    ({"data.train": "corpus.bin"}, 1, "data.train", "both files share: corpus"),
    ({"training.seed": 2**32}, 1, "training.seed", "at most 4294967295"),
]


@pytest.mark.parametrize(("overrides", "world_size", "path", "words"), CASES)
def test_impossible(overrides, world_size, path, words):
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        check_config(load_config(None, overrides), world_size=world_size)
    assert str(caught.value).startswith(f"1 problem in the configuration:\n  {path}"), str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "world_size"),
    [
        ({TP: 2, PP: 2, VP: 2, "parallel.sequence_parallel": True}, 4),
        ({CP: 2}, 2),
        ({"precision.fp8": "hybrid", "precision.fp8_param_gather": True, SHARDED: True}, 4),
        ({"training.rampup_batch_size": (4, 4, 100)}, 1),
        ({"training.rampup_batch_size": (16, 3, 100)}, 1),
        ({"optimizer.lr_warmup_steps": 1000}, 1),
        ({"optimizer.lr_decay_style": "wsd", "optimizer.lr_wsd_decay_steps": 100}, 1),
        ({"data.split": "1"}, 1),
        ({"data.train": ("0.7", "A", "0.3", "B")}, 1),
        ({"model.kv_channels": 64, "model.hidden_size": 250, "model.num_attention_heads": 4}, 1),
        ({"model.architecture": "qwen3", "model.qk_layernorm": True}, 1),
        ({TP: 4}, None),
        ({**BERT, "model.num_tokentypes": 2, "objective.name": "masked", "objective.max_ngram": 1}, 1),
        ({**BERT, "model.num_query_groups": 8, TP: 2, PP: 2, "parallel.sequence_parallel": True}, 4),
        ({**T5, "model.num_decoder_layers": 1, "model.kv_channels": 7, "data.seq_length": 4000, TP: 8}, 8),
        ({**GPT2, "model.hidden_size": 264, "data.reset_attention_mask": True}, 1),
    ],
)
def test_possible(overrides, world_size):
    check_config(load_config(None, overrides), world_size=world_size)


def test_every_rule_is_tried():
    """No rule is dead: each one answers at least one of the cases above."""
    answering = set()
    for overrides, world_size, _, _ in CASES:
        case = Case(load_config(None, overrides), world_size)
        answering |= {rule.check.__name__ for rule in RULES if list(rule.check(case))}
    assert {rule.check.__name__ for rule in RULES} - answering == {"_options_belong_to_the_optimizer"}  # see below


def test_an_option_of_another_optimizer_is_refused_with_the_own_ones():
    with pytest.raises(ConfigError) as caught:
        load_config(None, {"optimizer.name": "sgd", "optimizer.adam_beta1": 0.9, "optimizer.lr": -1.0})
    assert "2 problems" in str(caught.value)
    assert "optimizer.adam_beta1 = 0.9  (command line)" in str(caught.value)
    assert "belongs to optimizer.name adamw | adam | muon, not to sgd" in str(caught.value)
    assert "whose own options are optimizer.sgd_momentum, optimizer.sgd_nesterov" in str(caught.value)
    with pytest.raises(ConfigError, match="belongs to optimizer.name sgd, not to adamw"):
        check_config(RunConfig(optimizer=OptimizerConfig(sgd_momentum=0.5)))
    with pytest.raises(ConfigError, match="adamw, adam, sgd, muon|adamw | adam | sgd | muon") as caught:
        load_config(None, {"optimizer.name": "muno", "optimizer.muon_momentum": 0.9})
    assert "1 problem " in str(caught.value)


def test_a_later_choice_of_the_optimizer_replaces_the_options_of_an_earlier_one(tmp_path):
    """A preset's Adam betas do not stand in the way of --optimizer.name sgd, nor of a file that extends the preset."""
    config = load_config("bert_base", {"optimizer.name": "sgd", "optimizer.sgd_momentum": 0.5})
    assert (config.optimizer.adam_beta2, config.optimizer.weight_decay) == (OptimizerConfig().adam_beta2, 0.01)
    path = tmp_path / "muon.yaml"
    path.write_text("extends: bert_base\noptimizer: {name: muon, muon_adamw_lr: 1.0e-4}\n")
    muon = load_config(path).optimizer
    assert (muon.adam_beta2, muon.adam_eps, muon.muon_adamw_lr) == (0.999, 1e-6, 1e-4)  # they are Muon's as well
    # What is saved has the options of the chosen one only, and is read back as it was.
    save_config(config, tmp_path / "config.yaml")
    assert "adam" not in (tmp_path / "config.yaml").read_text()
    assert load_config(tmp_path / "config.yaml") == config
    assert load_config(tmp_path / "config.yaml", {"optimizer.name": "adamw"}).optimizer.sgd_momentum == 0.9


def test_rules_and_ranges_read_options_that_exist():
    rules = [*RULES, *FILE_RULES, *DISTILLATION_FILE_RULES]
    paths = [path for rule in rules for path in rule.reads] + [
        *AT_LEAST_ONE,
        *FRACTIONS,
        *NOT_NEGATIVE,
        *POSITIVE,
        *SHARES,
    ]
    assert [path for path in paths if path not in options()] == []


@pytest.mark.parametrize("path", [*AT_LEAST_ONE, *FRACTIONS, *NOT_NEGATIVE, *POSITIVE, *SHARES])
def test_numbers_out_of_range_are_refused_and_crash_no_rule(path):
    owner = next((name for name, traits in OPTIMIZERS.items() if path.partition(".")[2] in traits.fields), "adamw")
    for number in (0, -1) if path in (*AT_LEAST_ONE, *POSITIVE) else (-1,):
        problems = find_conflicts(load_config(None, {"optimizer.name": owner, path: number}), world_size=1)
        assert [problem.path for problem in problems] == [path]


def test_a_run_needs_a_corpus_whose_files_exist(tmp_path):
    def complaint(**overrides):
        config = load_config(None, {f"data.{name}": value for name, value in overrides.items()})
        with pytest.raises(ConfigError) as caught:
            check_config(config, require_data=True)
        return str(caught.value)

    assert "name the corpus" in complaint()
    (tmp_path / "p_text_document.bin").touch()
    (tmp_path / "p_text_document.idx").touch()
    (tmp_path / "q.bin").touch()
    found = str(tmp_path / "p_text_document")
    assert f"did you mean {found}?" in complaint(train=str(tmp_path / "p"))
    assert f"no file {tmp_path / 'q'}.idx" in complaint(train=("1", found, "2", str(tmp_path / "q")))
    assert "data.valid" in complaint(train=found, valid=str(tmp_path / "r"))
    assert "data.tokenizer" in complaint(train=found, tokenizer=str(tmp_path / "tokenizer"))
    check_config(load_config(None, {"data.train": found}), require_data=True)
    absent = load_config(None, {"data.train": found, "checkpoint.initialize_from": str(tmp_path / "c")})
    with pytest.raises(ConfigError, match=r"checkpoint\.initialize_from"):
        check_config(absent, require_data=True)
    untaught = load_config(None, {"data.train": found, "distillation.teacher": str(tmp_path / "c")})
    with pytest.raises(ConfigError, match=r"distillation\.teacher"):
        check_config(untaught, require_data=True)
