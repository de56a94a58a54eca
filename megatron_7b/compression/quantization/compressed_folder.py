"""Folders in the format of compressed-tensors, which transformers and vLLM read.

The library packs numbers and describes the folder; which numbers is decided here (`grid`, `gptq`, `awq`).
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import compressed_tensors
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from torch import Tensor, nn

from megatron_7b.compression.quantization.awq import scale_by_activations
from megatron_7b.compression.quantization.gptq import GptqOptions, round_by_gptq
from megatron_7b.compression.quantization.grid import RoundedWeight, round_inputs, round_to_nearest
from megatron_7b.compression.quantization.ignoring import is_ignored
from megatron_7b.compression.quantization.options import QuantizeOptions
from megatron_7b.compression.quantization.result import LayerError
from megatron_7b.compression.quantization.schemes import Scheme
from megatron_7b.compression.quantization.shards import ShardWriter
from megatron_7b.compression.quantization.statistics import InputStatistics, output_error, weight_error
from megatron_7b.compression.quantization.storage import as_it_is
from megatron_7b.conversion import HuggingFaceFolder
from megatron_7b.conversion.json_files import read_json, write_json
from megatron_7b.conversion.layerwise import LastStage

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float32}


class CompressedFolder:
    """A `Storage` of this format.

    Args:
        staging: Folder that receives weights; config.json is there already.
        source: The model.
        scheme: What matrices are stored in.
        options: How they are rounded, and which are not.
    """

    def __init__(self, staging: Path, source: HuggingFaceFolder, scheme: Scheme, options: QuantizeOptions) -> None:
        self.kept: list[str] = []
        self._staging, self._source = staging, source
        self._scheme, self._options = scheme, options
        self._library_scheme = library_scheme(scheme)
        self._compressor = BaseCompressor.get_value_from_registry(self._library_scheme.format)
        self._shards = ShardWriter(staging, options.max_shard_bytes)

    def first(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Keep them."""
        for name, tensor in tensors.items():
            self._shards.add(name, tensor)
        return {}

    def linears(self, prefix: str, stage: nn.Module) -> dict[str, nn.Linear]:
        """Return those that are rounded."""
        found = {name: one for name, one in stage.named_modules() if isinstance(one, nn.Linear)}
        return {name: one for name, one in found.items() if not is_ignored(prefix + name, self._options.ignore)}

    def layer(self, prefix: str, layer: nn.Module, statistics: InputStatistics | None) -> list[LayerError]:
        """Round a layer in place, and write it."""
        linears = self.linears(prefix, layer)
        self.kept += [
            prefix + name for name, one in layer.named_modules() if isinstance(one, nn.Linear) and name not in linears
        ]
        if self._options.method == "awq" and statistics is not None:
            heads = int(str(self._source.config["num_attention_heads"]))
            groups = int(str(self._source.config.get("num_key_value_heads") or heads))
            dtype = self._dtype_of(prefix + "input_layernorm.weight")
            scale_by_activations(layer, statistics, self._scheme, dtype, heads=heads, groups=groups)
        return self._round_and_write(prefix, layer, linears, statistics)

    def last(self, prefix: str, stage: LastStage, statistics: InputStatistics | None) -> list[LayerError]:
        """Write the last norm as it is, and the output layer if it has weights of its own."""
        for name, parameter in stage.norm.named_parameters():
            self._shards.add(prefix + name, parameter.to(self._dtype_of(prefix + name)))
        if "lm_head.weight" not in self._source:
            self.kept.append("lm_head")
            return []
        linears = self.linears("", stage)
        if not linears:
            self.kept.append("lm_head")
            self._shards.add("lm_head.weight", self._source["lm_head.weight"])
            return []
        return self._round_and_write("", nn.ModuleDict({"lm_head": stage.lm_head}), linears, statistics)

    @contextlib.contextmanager
    def _rounding_inputs(self, prefix: str, stage: nn.Module) -> Iterator[None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (round_inputs(inputs[0], self._scheme), *inputs[1:])

        hooks = [linear.register_forward_pre_hook(hook) for linear in self.linears(prefix, stage).values()]
        try:
            yield
        finally:
            for one in hooks:
                one.remove()

    def computing(self, prefix: str, stage: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Round the inputs of matrices too, if the scheme does."""
        return self._rounding_inputs(prefix, stage) if self._scheme.rounds_inputs else as_it_is()

    def finish(self) -> int:
        """Write what is left, and describe it in config.json."""
        self._shards.finish()
        config = read_json(self._staging / "config.json")
        described = QuantizationConfig(
            config_groups={"group_0": self._library_scheme},
            format=self._library_scheme.format,
            quantization_status="compressed",
            ignore=sorted(self.kept),
        ).model_dump(mode="json")
        config["quantization_config"] = {
            **described, "quant_method": "compressed-tensors", "version": compressed_tensors.__version__,
        }  # fmt: skip
        write_json(self._staging / "config.json", config)
        return self._shards.num_bytes

    def _round_and_write(
        self, prefix: str, stage: nn.Module, linears: Mapping[str, nn.Linear], statistics: InputStatistics | None
    ) -> list[LayerError]:
        errors = []
        for name, tensor in stage.state_dict().items():
            module = name.removesuffix(".weight")
            dtype = self._dtype_of(prefix + name)
            if module not in linears or not name.endswith(".weight"):
                self._shards.add(prefix + name, tensor.to(dtype))
                continue
            hessian = statistics.hessian(module) if statistics is not None else None
            weight = tensor.clone()
            rounded = self._round(weight, hessian, dtype)
            values = rounded.values()
            linears[module].weight.copy_(values)
            of_output = None if hessian is None else output_error(weight, values, hessian)
            errors.append(LayerError(prefix + module, of_output, weight_error(weight, values)))
            for part, packed in self._pack(rounded).items():
                self._shards.add(f"{prefix}{module}.{part}", packed)
        return errors

    def _round(self, weight: Tensor, hessian: Tensor | None, dtype: torch.dtype) -> RoundedWeight:
        if self._options.method == "gptq":
            assert hessian is not None
            how = GptqOptions(self._options.damping, self._options.act_order)
            return round_by_gptq(weight, hessian, self._scheme, dtype, how)
        return round_to_nearest(weight, self._scheme, dtype)

    def _pack(self, rounded: RoundedWeight) -> dict[str, Tensor]:
        width = rounded.steps.shape[1] // rounded.scales.shape[1]
        exact = rounded.steps * rounded.scales.float().repeat_interleave(width, dim=1)
        packed: dict[str, Tensor] = self._compressor.compress(
            {"weight": exact, "weight_scale": rounded.scales}, self._library_scheme
        )
        return packed

    def _dtype_of(self, name: str) -> torch.dtype:
        return _DTYPES[self._source.dtypes[name]]


@functools.cache
def library_scheme(scheme: Scheme) -> QuantizationScheme:
    """Return a scheme in compressed-tensors' words."""
    kind = "float" if scheme.is_float else "int"
    weights: dict[str, Any] = {"num_bits": scheme.num_bits, "type": kind, "symmetric": True, "dynamic": False}
    weights |= (
        {"strategy": "channel"} if scheme.group_size is None else {"strategy": "group", "group_size": scheme.group_size}
    )
    inputs: dict[str, Any] = {"num_bits": scheme.num_bits, "type": kind, "strategy": "token", "symmetric": True}
    rounded = "float-quantized" if scheme.is_float else "int-quantized"
    return QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**weights),
        input_activations=QuantizationArgs(**inputs, dynamic=True) if scheme.rounds_inputs else None,
        format=rounded if scheme.rounds_inputs else "pack-quantized",
    )
