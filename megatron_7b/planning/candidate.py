"""One layout of a run: what it takes, whether it fits, and how it is started."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from megatron_7b.config.options import command_words, get_value
from megatron_7b.config.schema import RunConfig
from megatron_7b.planning.layouts import CHOSEN, layout_of
from megatron_7b.planning.memory import RankMemory
from megatron_7b.planning.step_time import StepTime

_FILLED = 0.96
"""Of a device's memory may be used: what is predicted to fill it entirely would not run."""
_STAGES_SHOWN = 8
"""With more, a name says only that they are uneven."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One layout of a run.

    Attributes:
        config: The run at this layout.
        world_size: Its ranks.
        memory: Of the rank that holds most.
        available_memory: Of its device.
        time: Of a step.
        tokens_per_second_per_gpu: That the run reads.
        tflops_per_gpu: Of the model itself: causal attention, nothing counted for recompute.
        mfu: These as a share of the device's rate in the format of the run.
        changed: Options of `FORMATS` that are not as the run has them, by path: results differ in their last digits.
    """

    config: RunConfig
    world_size: int
    memory: RankMemory
    available_memory: int
    time: StepTime
    tokens_per_second_per_gpu: float
    tflops_per_gpu: float
    mfu: float
    changed: Mapping[str, object] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        """Whether its fullest rank fits into its device, with a few percent to spare."""
        return self.memory.total <= _FILLED * self.available_memory

    @property
    def num_microbatches(self) -> int:
        """That each replica takes one after the other in a step."""
        training = self.config.training
        return training.global_batch_size // (
            training.micro_batch_size * layout_of(self.config, self.world_size).dp_size
        )

    @property
    def means(self) -> int:
        """How many kinds of parallelism and recompute it needs beside data parallelism."""
        parallel = self.config.parallel
        return sum(
            (
                parallel.tensor_model_parallel_size > 1,
                parallel.pipeline_model_parallel_size > 1,
                parallel.virtual_pipeline_model_parallel_size is not None,
                parallel.context_parallel_size > 1,
                parallel.expert_model_parallel_size > 1,
                parallel.recompute_granularity != "none",
            )
        )

    @property
    def limit(self) -> str:
        """What it has too little of: memory, with the largest kind, or time, with the part to look at first."""
        if not self.fits:
            kinds = {name: size for name, size in self.memory.as_dict().items() if name != "total"}
            largest = max(kinds, key=lambda name: kinds[name])
            missing = (self.memory.total - _FILLED * self.available_memory) / 1e9
            return f"memory: {missing:,.1f} GB too much, {largest} {kinds[largest] / 1e9:,.1f}"
        parts = {name: seconds for name, seconds in self.time.as_dict().items() if name != "total"}
        others = {name: seconds for name, seconds in parts.items() if name != "matrix_products"}
        largest = max(others, key=lambda name: others[name])
        share = others[largest] / self.time.total
        name = "matrix_products" if share < 0.1 else largest
        return f"{name.replace('_', ' ')} {100 * parts[name] / self.time.total:.0f} %"

    def layout(self) -> dict[str, object]:
        """Return sizes and options of the layout by their names in the configuration."""
        parallel, training = self.config.parallel, self.config.training
        names = [path.removeprefix("parallel.") for path in CHOSEN if path.startswith("parallel.")]
        precision = self.config.precision
        return {
            **{name: getattr(parallel, name) for name in names},
            "data_parallel_size": layout_of(self.config, self.world_size).dp_size,
            "micro_batch_size": training.micro_batch_size,
            "num_microbatches": self.num_microbatches,
            "optimizer_state_dtype": precision.optimizer_state_dtype,
            "grad_reduce_in_fp32": precision.grad_reduce_in_fp32,
        }

    def settings(self) -> dict[str, object]:
        """Return the options that make a run of this layout, by dotted path: all that a plan decides on."""
        return {path: get_value(self.config, path) for path in CHOSEN}

    @property
    def name(self) -> str:
        """Its sizes: `TP2×PP4×DP8+SP (9+9+9+5)`."""
        parallel = self.config.parallel
        stages, text = parallel.pipeline_model_parallel_layout, str(layout_of(self.config, self.world_size))
        text += "+SP" if parallel.sequence_parallel else ""
        if not stages:
            return text
        return f"{text} ({'+'.join(map(str, stages))})" if len(stages) <= _STAGES_SHOWN else f"{text} (fewer last)"

    @property
    def recompute(self) -> str:
        """What it computes again in the backward pass, in a word or two."""
        parallel = self.config.parallel
        match parallel.recompute_granularity:
            case "full" if parallel.recompute_method == "uniform":
                return "all"
            case "full":
                return f"{parallel.recompute_num_layers} per stage"
            case "selective":
                return " ".join(parallel.recompute_modules)
            case _:
                return "none"

    @property
    def details(self) -> tuple[str, ...]:
        """What else distinguishes it: recompute and narrower formats, if there are any."""
        recompute = () if self.recompute == "none" else (f"recompute {self.recompute}",)
        return (*recompute, self.formats) if self.formats else recompute

    @property
    def formats(self) -> str:
        """What is narrower than the run has it, in words; empty: nothing."""
        names = {"precision.optimizer_state_dtype": "moments", "precision.grad_reduce_in_fp32": "gradients"}
        narrower = " and ".join(names[path] for path in self.changed)
        return narrower and f"BF16 {narrower}"

    def words(self, node_size: int, config: RunConfig) -> Iterator[str]:
        """Yield the words that a run of this layout needs on its command line, beside those of the run itself.

        Args:
            node_size: Devices per node.
            config: The run as presets, files and the rest of the command line make it.
        """
        nodes = self.world_size // node_size
        yield from (
            ("--nproc", str(self.world_size)) if nodes <= 1 else ("--nnodes", str(nodes), "--nproc", str(node_size))
        )
        for path, value in {**self.settings(), **self.changed}.items():
            if value != get_value(config, path):
                yield from command_words(path, value)

    def as_dict(self) -> dict[str, object]:
        """Return everything, as `megatron-7b plan --json` prints it."""
        return {
            "fits": self.fits,
            "layout": self.layout(),
            "memory_bytes": self.memory.as_dict(),
            "step_seconds": self.time.as_dict(),
            "tokens_per_second_per_gpu": self.tokens_per_second_per_gpu,
            "tflops_per_gpu": self.tflops_per_gpu,
            "mfu": self.mfu,
            "limit": self.limit,
            "changed": dict(self.changed),
        }
