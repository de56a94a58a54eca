"""A GGUF file as a `Storage`: written tensor by tensor, in the order in which the model computes."""

import contextlib
from pathlib import Path

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from megatron_7b.compression.quantization.gguf.architecture import GgufArchitecture
from megatron_7b.compression.quantization.gguf.blocks import TYPES, pack, unpack
from megatron_7b.compression.quantization.gguf.types import FILE_TYPES, type_of
from megatron_7b.compression.quantization.gguf.vocabulary import write_vocabulary
from megatron_7b.compression.quantization.result import LayerError
from megatron_7b.compression.quantization.statistics import InputStatistics, output_error, weight_error
from megatron_7b.compression.quantization.storage import as_it_is
from megatron_7b.conversion import HuggingFaceFolder
from megatron_7b.conversion.layerwise import LastStage, LayerwiseDecoder


class GgufFile:
    """The file in the making: its header, with the place of every tensor, is written at once.

    Args:
        path: Where.
        source: The model.
        decoder: The same, as it computes.
        kind: Type of the file, such as q8_0.

    Raises:
        ConfigError: llama.cpp has no such model, or no such tokenizer.
    """

    def __init__(self, path: Path, source: HuggingFaceFolder, decoder: LayerwiseDecoder, kind: str) -> None:
        self.kept: list[str] = []
        self._num_bytes = 0
        self._architecture = GgufArchitecture.of(source.config, source.path)
        self._last_prefix, self._tied = decoder.norm_prefix, decoder.is_tied
        self._extra = self._architecture.extra_tensors()
        layers = [[n for n in source if n.startswith(decoder.layer_prefix(i))] for i in range(decoder.num_layers)]
        head = [] if decoder.is_tied else ["lm_head.weight"]
        names = [
            *decoder.first_names(), *(name for layer in layers for name in layer),
            *(name for name in source if name.startswith(decoder.norm_prefix)), *head,
        ]  # fmt: skip
        self._order = names
        self._writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[self._architecture.kind])
        self._architecture.describe(self._writer, str(source.config.get("_name_or_path") or source.path.name))
        self._writer.add_file_type(FILE_TYPES[kind])
        self._writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        write_vocabulary(self._writer, source.path, source.shapes[decoder.embedding_name][0])
        self._types = {name: self._announce(name, source.shapes[name], kind, decoder) for name in names}
        if kind not in ("f16", "bf16"):  # blocks that do not divide their rows
            self.kept = [name for name, chosen in self._types.items() if chosen == TYPES.F16]
        for name, tensor in self._extra.items():
            self._writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), tensor.nbytes, TYPES.F32)
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_ti_data_to_file()

    def first(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Write what is before the layers; return what llama.cpp computes with."""
        return {name: self._write(name, tensor.float()) for name, tensor in tensors.items()}

    def linears(self, _prefix: str, stage: nn.Module, /) -> dict[str, nn.Linear]:
        """Return all, to weigh errors."""
        return {name: one for name, one in stage.named_modules() if isinstance(one, nn.Linear)}

    def layer(self, prefix: str, layer: nn.Module, statistics: InputStatistics | None) -> list[LayerError]:
        """Round a layer in place, and write it."""
        errors, tensors, linears = [], layer.state_dict(), self.linears(prefix, layer)
        for name in self._order:
            if not name.startswith(prefix):
                continue
            tensor = tensors[name.removeprefix(prefix)]
            before = tensor.clone()
            tensor.copy_(self._write(name, tensor))
            module = name.removeprefix(prefix).removesuffix(".weight")
            if tensor.dim() == 2:
                known = statistics is not None and module in linears
                hessian = statistics.hessian(module) if statistics is not None and known else None
                of_output = None if hessian is None else output_error(before, tensor, hessian)
                errors.append(LayerError(prefix + module, of_output, weight_error(before, tensor)))
        return errors

    def last(self, prefix: str, stage: LastStage, statistics: InputStatistics | None) -> list[LayerError]:
        """Round the last norm and the output layer in place, and write them."""
        tensors = stage.norm.state_dict()
        for name in self._order:
            if name.startswith(prefix):
                tensors[name.removeprefix(prefix)].copy_(self._write(name, tensors[name.removeprefix(prefix)]))
        if self._tied:
            return []
        weight = stage.lm_head.get_parameter("weight")
        before = weight.clone()
        weight.copy_(self._write("lm_head.weight", weight))
        of_output = None if statistics is None else output_error(before, weight, statistics.hessian("lm_head"))
        return [LayerError("lm_head", of_output, weight_error(before, weight))]

    def computing(self, _prefix: str, _stage: nn.Module, /) -> contextlib.AbstractContextManager[None]:
        """Compute with the weights alone: llama.cpp also rounds inputs, to 8 bits, differently on each machine."""
        return as_it_is()

    def finish(self) -> int:
        """Write what no folder has, and close the file; return the bytes of all tensors."""
        for tensor in self._extra.values():
            self._writer.write_tensor_data(tensor.numpy())
        self._writer.close()
        return self._num_bytes

    def _announce(
        self, name: str, shape: tuple[int, ...], kind: str, decoder: LayerwiseDecoder
    ) -> gguf.GGMLQuantizationType:
        theirs = self._architecture.name_of(name)
        turned = tuple(self._architecture.turned(name, torch.empty(shape, device="meta")).shape)
        chosen = type_of(theirs, turned, kind, num_layers=decoder.num_layers, is_tied=decoder.is_tied)
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[chosen]
        row_bytes = turned[-1] // per_block * block_bytes
        num_bytes = row_bytes * int(np.prod(turned[:-1]))
        self._num_bytes += num_bytes
        if chosen in (TYPES.F32, TYPES.F16):
            dtype = np.float32 if chosen == TYPES.F32 else np.float16
            self._writer.add_tensor_info(theirs, turned, np.dtype(dtype), num_bytes, chosen)
        else:
            self._writer.add_tensor_info(theirs, (*turned[:-1], row_bytes), np.dtype(np.uint8), num_bytes, chosen)
        return chosen

    def _write(self, name: str, tensor: Tensor) -> Tensor:
        """Write a tensor; return what llama.cpp computes with, in our order."""
        kind = self._types[name]
        values = self._architecture.turned(name, tensor).contiguous().cpu().numpy()
        packed: NDArray[np.generic] = pack(values, kind)
        self._writer.write_tensor_data(packed)
        read = torch.from_numpy(unpack(packed, kind).astype(np.float32)).view(values.shape)
        return self._architecture.turned_back(name, read).to(tensor.device)
