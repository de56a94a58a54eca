"""The typed sections of a run: one frozen dataclass per component, a docstring under each field.

Field names are megatron-core's wherever it has the concept. Steps are optimizer updates, samples are sequences of
`data.seq_length` tokens. Nothing here imports torch.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from megatron_7b.config.adapters import AdapterConfig
from megatron_7b.config.distillation_config import DistillationConfig
from megatron_7b.config.finetune_config import FinetuneConfig
from megatron_7b.config.model_config import ModelConfig, RopeScalingConfig
from megatron_7b.config.objectives import OBJECTIVES, OF_HEADS
from megatron_7b.config.one_of import OneOf
from megatron_7b.config.optimizer_config import OptimizerConfig
from megatron_7b.config.stages import divide_layers

__all__ = ["ModelConfig", "RopeScalingConfig", "RunConfig"]


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the model is trained to predict."""

    name: Annotated[str, OneOf(OBJECTIVES)] | None = None
    """causal: the next token; masked: hidden tokens of a sentence; span: what gaps of a text have lost. None means the
    usual one of the kind of model."""
    masked_share: float = 0.15
    """masked: share of a sample's tokens that are hidden."""
    max_ngram: int = 3
    """masked: most neighbouring words that are hidden together; n words are drawn with a probability of about 1/n."""
    whole_words: bool = True
    """masked: hide words with all their tokens."""
    word_segmenter: Literal["none", "jieba"] = "none"
    """masked: what finds the words of Chinese text, for whole_words; jieba needs the extra `chinese`."""
    masks_per_text: int = 1
    """masked: samples in a row that show the same text, each with other words hidden: none is hidden in two of them."""
    predict_word_before: bool = False
    """masked: predict the word before each hidden span as well; it stays visible, and its loss is reported apart."""
    samples: Literal["packed", "padded"] = "packed"
    """masked: full windows across documents, or whole sentences of one document, filled up with padding."""
    sentence_pairs: Literal["none", "next_sentence", "sentence_order"] = "none"
    """masked: padded pairs; a head tells whether the second text continues the first, or whether they are swapped."""
    short_share: float = 0.1
    """masked: share of padded samples that are shorter than data.seq_length, of a random length."""
    noise_density: float = 0.15
    """span: share of a text's tokens that are taken out of it."""
    mean_span_length: float = 3.0
    """span: tokens that are taken out together, on average."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model and the batch are distributed over ranks."""

    tensor_model_parallel_size: int = 1
    """Ranks that every weight matrix is sharded over."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages that the layers are divided into."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks per pipeline rank (interleaved 1F1B); None means the plain schedule."""
    pipeline_model_parallel_layout: tuple[int, ...] = ()
    """Layers of each pipeline stage, in the order of the model (virtual stages one by one); empty: evenly, or if they
    do not divide, fewer on the last stage, which computes the loss, and on the first, which embeds."""
    context_parallel_size: int = 1
    """Ranks that every sequence of a decoder is split over."""
    expert_model_parallel_size: int = 1
    """Data- and context-parallel ranks that share the experts of a layer, each holding some of them."""
    sequence_parallel: bool = False
    """Shard the activations between tensor-parallel blocks along the sequence."""
    use_distributed_optimizer: bool = False
    """Shard optimizer state over data-parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool = False
    """Overlap the reduction of gradients with the backward pass."""
    overlap_param_gather: bool = False
    """Overlap the gathering of updated parameters with the next forward pass; needs the two options above."""
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """Trade time for memory: recompute some modules (selective) or whole layers (full) in the backward pass."""
    recompute_modules: tuple[str, ...] = ("core_attn",)
    """What selective recomputes, by megatron-core's names: core_attn, mlp, or with experts moe."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """How full recompute groups layers; see recompute_num_layers."""
    recompute_num_layers: int = 1
    """Transformer layers per recomputed group (uniform) or recomputed layers per stage (block)."""

    @property
    def num_stages(self) -> int:
        """Pipeline stages, virtual ones counted apart."""
        return self.pipeline_model_parallel_size * (self.virtual_pipeline_model_parallel_size or 1)

    def stage_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return how many of a model's layers each stage has, in the order of the model."""
        return self.pipeline_model_parallel_layout or divide_layers(num_layers, self.num_stages)

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model: tp × pp × cp."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Number formats of parameters, gradients and matrix products."""

    params_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Dtype of the working parameters; bf16 keeps FP32 main parameters. auto: bf16 where the hardware supports it."""
    grad_reduce_in_fp32: bool = True
    """Accumulate and reduce gradients in FP32 where parameters are BF16."""
    fp8: Literal["none", "hybrid", "e4m3"] = "none"
    """FP8 matrix products in Transformer Engine layers."""
    fp8_recipe: Literal["tensorwise", "blockwise", "mxfp8"] = "tensorwise"
    """Granularity of FP8 scales: per tensor, per block, or per 32 values (Blackwell)."""
    fp8_param_gather: bool = False
    """Keep the working parameters in FP8 instead of BF16."""
    optimizer_state_dtype: Literal["fp32", "bf16"] = "fp32"
    """Storage of Adam's two moments; bf16 needs adamw or adam, Transformer Engine and the distributed optimizer."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training data. A corpus is `PREFIX` or a weighted blend `W1 PREFIX1 W2 PREFIX2 …` of .bin/.idx pairs."""

    train: tuple[str, ...] = ()
    """Corpus prefix, or weights and prefixes in turn."""
    valid: tuple[str, ...] = ()
    """Validation corpus; empty means the validation share of `split`."""
    split: str = "98,2,0"
    """Shares of the documents of `train` for training, validation and test."""
    max_epochs: tuple[float, ...] = ()
    """Maximum epochs of each set of `train`, or of all; 0 is no limit. Others take over an exhausted set's share."""
    on_order_change: Literal["refuse", "trust", "restart"] = "refuse"
    """If a resume would not continue what was read: refuse, trust in changed corpora, or restart with a new pass."""
    verify: Literal["quick", "full"] = "quick"
    """Check corpora against their manifests at the start: sizes and parts of the files, or every byte."""
    tokenizer: str | None = None
    """Tokenizer folder or file; None means the one named by the corpus."""
    seq_length: int = 256
    """Tokens per sample."""
    reset_attention_mask: bool = False
    """Keep documents apart: no token attends to another document."""
    reset_position_ids: bool = False
    """Restart position ids in each document; needs reset_attention_mask."""
    eod_mask_loss: bool = False
    """Exclude the prediction after an end-of-document token from the loss."""
    fim_rate: float = 0.0
    """Share of training documents rearranged for fill-in-the-middle; each gives up its last three tokens."""
    fim_spm_rate: float = 0.5
    """Share of these written suffix first (SPM); the others are written prefix first (PSM)."""
    fim_tokens: tuple[str, str, str] = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
    """Tokens of the tokenizer that mark prefix, middle and suffix."""
    num_workers: int = 1
    """Threads that assemble batches ahead of the training step; 0 assembles them synchronously."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Length, batch sizes and validation of a run."""

    train_steps: int = 100
    """Optimizer updates of the whole run, including those before a resume."""
    micro_batch_size: int = 4
    """Sequences per microbatch on each data-parallel rank."""
    global_batch_size: int = 16
    """Sequences per step over all ranks."""
    rampup_batch_size: tuple[int, int, int] | None = None
    """Start size, increment, and samples over which the global batch grows to its full size."""
    seed: int = 1234
    """Seed of initial weights and sample order, which are the same at every layout, and of dropout."""
    eval_interval_steps: int = 0
    """Steps between validations; 0 validates only at the end (if there is validation data)."""
    eval_steps: int = 10
    """Global batches per validation."""
    early_stop_validations: int = 0
    """End after this many validations in a row without a better one, by checkpoint.keep_best; 0 never does."""
    max_consecutive_nonfinite_steps: int = 5
    """Stop after this many consecutive skipped steps (loss or gradient not finite)."""
    exit_after_seconds: float | None = None
    """Save and exit with code 75 after this many seconds."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written, which are kept, and where initial weights come from."""

    save_interval_steps: int = 0
    """Steps between checkpoints; 0 saves only at the end and on signals."""
    keep_last: int = 3
    """Number of newest checkpoints to keep; 0 keeps all."""
    keep_best: str | None = None
    """Keep the best weights as RUN/best: by validation_loss, by another figure of validations, or by one of
    telemetry.eval_tasks such as eval/hellaswag/acc_norm."""
    asynchronous: bool = False
    """Write the checkpoints of the interval while training continues, from copies in host memory."""
    save_optimizer: bool = True
    """Save the optimizer state as well; without it a run cannot resume."""
    initialize_from: str | None = None
    """Checkpoint whose weights a fresh run starts from, written at any layout; of its optimizer state, only FP32 main
    parameters are used. With an adapter: the model that it adapts, wherever that is now."""
    on_optimizer_change: Literal["refuse", "restart"] = "refuse"
    """If a run resumes with another optimizer: refuse, or keep weights and progress and begin its state anew."""
    verify_on_load: bool = True
    """Check every file's hash before its bytes are used; the hashes of small files are checked in any case."""


@dataclass(frozen=True, kw_only=True)
class TelemetryConfig:
    """Logging. metrics.jsonl, TensorBoard and Weights & Biases record every step regardless of these options."""

    log_interval_steps: int = 10
    """Steps between log lines; slow steps have one a minute."""
    parameter_norms: Literal["none", "groups", "layers"] = "none"
    """Norms of the gradients and parameters of embedding, attention, mlp, norms and head, whole or by layer."""
    profile_steps: str | None = None
    """Steps to profile, such as 10-12: a trace and a table of kernels in the run folder's profile/."""
    profile_ranks: tuple[int, ...] = (0,)
    """Ranks whose steps are profiled."""
    tensorboard: bool = True
    """Write TensorBoard events into the run folder."""
    wandb: bool = False
    """Report to Weights & Biases; needs the extra `wandb`."""
    wandb_project: str = "megatron_7b"
    """Project in Weights & Biases."""
    plot: bool = True
    """Draw loss.png at the end."""
    eval_tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness that the model is measured on as it trains: names, groups, or YAML files."""
    eval_tasks_interval_steps: int = 0
    """Steps between these measurements; 0 measures only at the end."""
    eval_tasks_data: str | None = None
    """Folder with the tasks' data sets, as for `evaluate --task-data`."""
    eval_tasks_include_path: tuple[str, ...] = ()
    """Folders with tasks of your own."""
    eval_tasks_limit: int | None = None
    """Only the first questions of each task; None: all."""
    eval_tasks_num_fewshot: int | None = None
    """Examples before each question; None: as the task says."""
    eval_tasks_chat_template: bool = False
    """Put questions into the tokenizer's chat template."""
    eval_tasks_batch_size: int = 16
    """Texts of tasks that share a forward pass."""


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Device, threads and timeouts."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses the GPU if torch sees one."""
    distributed_timeout_minutes: float = 30.0
    """How long a collective waits for a late rank before the run fails."""
    num_threads: int | None = None
    """Compute threads per rank on a CPU; None divides the cores among the local ranks."""
    deterministic: bool = False
    """Use only deterministic GPU kernels, at some cost in speed; on a CPU they always are."""
    cuda_graph_impl: Literal["none", "local"] = "none"
    """local: start the kernels of each layer at once, as a CUDA graph; needs Transformer Engine. FP8 gains the most."""
    cross_entropy_impl: Literal["auto", "full", "te", "chunked"] = "auto"
    """Loss of a decoder: full: from all logits; te: from all logits, by Transformer Engine's kernel; chunked: with the
    output layer, some hundred tokens at a time; auto: te with Transformer Engine's layers, else chunked."""
    check_memory: bool = True
    """Refuse a model whose parameters, gradients and optimizer state alone are more than the memory available."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that determines a run. The effective one is saved in the run folder and in every checkpoint."""

    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def cross_entropy_impl(self, *, has_transformer_engine: bool) -> Literal["full", "te", "chunked"]:
        """Return how the loss is computed, given whether the layers are Transformer Engine's.

        megatron-core's own losses know neither a teacher nor smoothing over all tensor ranks' tokens.
        """
        if self.finetune.label_smoothing > 0.0 or self.distillation.is_used or self.model.traits.kind != "decoder":
            return "chunked"
        if self.runtime.cross_entropy_impl != "auto":
            return self.runtime.cross_entropy_impl
        return "te" if has_transformer_engine else "chunked"

    @property
    def objective_name(self) -> str:
        """The objective that is named, or the usual one of the head or the kind of model."""
        if self.objective.name is None and self.model.has_head:
            return OF_HEADS[self.model.head]
        usual = (name for name, kinds in OBJECTIVES.items() if self.model.traits.kind in kinds)
        return self.objective.name or next(usual, "causal")
