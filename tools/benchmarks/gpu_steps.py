"""What `gpu.py` measures: its steps in the order of their importance, the models, and the options that are compared."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

TINY_SECONDS = 25
"""Of a step on a tiny model, most of them for imports."""


@dataclass(frozen=True)
class Step:
    """One measurement.

    Attributes:
        name: In the folder of results.
        what: In words.
        work: The function of gpu_measurements that does it.
        seconds: How long it takes on an H100, roughly.
        settings: What distinguishes it from others of the same `work`.
        tiny_seconds: The same as `seconds` for tiny models on a CPU.
    """

    name: str
    what: str
    work: str
    seconds: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    tiny_seconds: int = TINY_SECONDS

    def limit(self, *, is_tiny: bool) -> int:
        """Return after how many seconds it is ended."""
        return 240 if is_tiny else 2 * self.seconds + 30  # tiny models are for machines that also do other work

    def estimate(self, *, is_tiny: bool) -> int:
        """Return about how many seconds it takes."""
        return self.tiny_seconds if is_tiny else self.seconds


@dataclass(frozen=True)
class Shape:
    """A model and batch that are timed.

    Attributes:
        preset: Whose model it is.
        seq_length: Tokens of a sequence.
        micro_batch_size: Sequences of a microbatch.
        num_microbatches: Of a step.
        most_layers: Of the model; fewer where the memory does not hold them.
    """

    preset: str
    seq_length: int
    micro_batch_size: int
    num_microbatches: int
    most_layers: int


SHAPES = {
    "qwen": Shape("qwen2_5_7b", 1024, 4, 16, 28),
    # Eight layers: the transformers model with the same shape and batch, and every option, then fit as well.
    "llama": Shape("llama2_7b", 4096, 2, 4, 8),
}
TINY = Shape("tiny_cpu", 64, 2, 2, 2)

Format = Literal["bf16", "fp8"]

BASE: dict[str, Any] = {
    "parallel.tensor_model_parallel_size": 1,
    "parallel.pipeline_model_parallel_size": 1,
    "parallel.use_distributed_optimizer": True,
    "parallel.overlap_grad_reduce": True,
    "parallel.overlap_param_gather": True,
}
NARROW_MOMENTS = {"precision.optimizer_state_dtype": "bf16"}
FP8 = {"precision.fp8": "hybrid", "precision.fp8_recipe": "tensorwise"}


def _speed(name: str, what: str, shape: str, seconds: int, **settings: Any) -> Step:
    return Step(name, what, "speed", seconds, {"shape": shape, **settings})


def _option(name: str, what: str, options: Mapping[str, Any], *, needs_engine: bool = False) -> Step:
    """Return a step that times the eight layers of Llama 2 with other options; compare with `llama_bf16`."""
    settings = {"shape": "llama", "options": dict(options), "needs_engine": needs_engine, "is_option": True}
    return Step(f"option_{name}", what, "speed", 35, settings)


STEPS: tuple[Step, ...] = (
    Step("environment", "device, versions, rates of products and copies", "environment", 15),
    Step("reference", "losses and gradients in FP32 on the CPU", "reference", 20),
    Step("correctness", "twenty losses and every gradient of each number format, against FP32", "correctness", 60),
    Step("tests", "the quick half of tests/gpu", "quick_tests", 45),
    _speed("llama_bf16", "Llama 2's shape, 4096 tokens, BF16", "llama", 40, profile=True),
    _speed("llama_transformers", "the same model and batch in transformers", "llama", 35, contender="transformers"),
    _speed("qwen_bf16", "Qwen2.5-7B, 1024 tokens, BF16", "qwen", 60, options=NARROW_MOMENTS, profile=True),
    _speed("qwen_transformers", "the same model and batch in transformers", "qwen", 60, contender="transformers"),
    _speed("llama_fp8", "Llama 2's shape, FP8", "llama", 40, options=FP8, needs_engine=True, profile=True),
    _speed("qwen_fp8", "Qwen2.5-7B, FP8", "qwen", 60, options={**FP8, **NARROW_MOMENTS}, needs_engine=True),
    Step("start_up", "from the command to the first step (2 B parameters); small commands", "start_up", 90, {}, 60),
    Step("decode", "tokens per second of generation, Qwen2.5-7B's shape in BF16", "decode", 60, {"shape": "qwen"}),
    _option("cuda_graphs", "BF16 with CUDA graphs", {"runtime.cuda_graph_impl": "local"}, needs_engine=True),
    _option("fp8_cuda_graphs", "FP8 with CUDA graphs", {**FP8, "runtime.cuda_graph_impl": "local"}, needs_engine=True),
    _option("loss_full", "loss from all logits, by megatron-core", {"runtime.cross_entropy_impl": "full"}),
    _option("loss_chunked", "loss in chunks", {"runtime.cross_entropy_impl": "chunked"}),
    _option("local", "torch-native layers", {"model.transformer_impl": "local"}),
    _option("narrow_moments", "Adam's moments in BF16", NARROW_MOMENTS, needs_engine=True),
    _option(
        "narrow_gradients",
        "gradients and Adam's moments in BF16",
        {**NARROW_MOMENTS, "precision.grad_reduce_in_fp32": False},
        needs_engine=True,
    ),
    _option("host_moments", "Adam's moments in host memory", {"optimizer.cpu_offload": True}),
    _option("recompute_core_attn", "recompute core attention", {"parallel.recompute_granularity": "selective"}),
    _option(
        "recompute_mlp",
        "recompute MLPs",
        {"parallel.recompute_granularity": "selective", "parallel.recompute_modules": ("mlp",)},
    ),
    _option("recompute_full", "recompute whole layers", {"parallel.recompute_granularity": "full"}),
    _option(
        "fp8_blockwise", "FP8 with a scale per block", {**FP8, "precision.fp8_recipe": "blockwise"}, needs_engine=True
    ),
    _option(
        "fp8_parameters", "FP8 with parameters in FP8", {**FP8, "precision.fp8_param_gather": True}, needs_engine=True
    ),
)
