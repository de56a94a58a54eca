"""Models in llama.cpp's words: names of tensors, order of channels, sizes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from megatron_7b.errors import ConfigError

_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gpt2": gguf.MODEL_ARCH.GPT2,
}
_MISTRALS_WINDOW = 4096
"""What transformers assumes where a Mistral's config.json says nothing."""
_TURNED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
"""Matrices that GPT-2 stores with inputs first."""


@dataclass(frozen=True)
class GgufArchitecture:
    """A model in llama.cpp's words.

    Attributes:
        config: Of config.json.
        kind: llama.cpp's name of the architecture.
        num_layers: Layers.
    """

    config: Mapping[str, Any]
    kind: gguf.MODEL_ARCH
    num_layers: int

    @classmethod
    def of(cls, config: Mapping[str, Any], path: Path) -> "GgufArchitecture":
        """Return that of a folder.

        Raises:
            ConfigError: llama.cpp has none that computes the same, as far as is known here.
        """
        name = str(config.get("model_type"))
        if name not in _ARCHITECTURES:
            raise ConfigError(f"{path} is a {name}; GGUF files are written of {', '.join(_ARCHITECTURES)}")
        scaling = cls._rope(config).get("rope_type", "default")
        if name != "gpt2" and scaling not in ("default", "llama3"):
            raise ConfigError(f"{path} scales its rotary embedding by {scaling!r}, expected none or llama3")
        window = config.get("sliding_window", _MISTRALS_WINDOW if name == "mistral" else None)
        if window and config.get("use_sliding_window", name == "mistral"):
            raise ConfigError(
                f"{path} has a sliding window of {window} tokens, which is not written to GGUF files",
                hint="--scheme w4a16, w8a16, w8a8 and fp8 keep it, in folders for transformers and vLLM",
            )
        return cls(config, _ARCHITECTURES[name], int(config.get("num_hidden_layers") or config["n_layer"]))

    def name_of(self, name: str) -> str:
        """Return llama.cpp's name of a tensor."""
        found = gguf.get_tensor_name_map(self.kind, self.num_layers).get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ConfigError(f"llama.cpp's {gguf.MODEL_ARCH_NAMES[self.kind]} has no tensor for {name}")
        return str(found)

    def turned(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor with inputs last, and queries and keys in the order in which llama.cpp rotates channels."""
        if self.kind == gguf.MODEL_ARCH.GPT2:
            return tensor.T if name.endswith(_TURNED) else tensor
        heads = self._heads_of(name)
        if heads is None:
            return tensor
        width = tensor.shape[0] // heads
        return tensor.reshape(heads, 2, width // 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)

    def turned_back(self, name: str, tensor: Tensor) -> Tensor:
        """Undo `turned`."""
        if self.kind == gguf.MODEL_ARCH.GPT2:
            return tensor.T if name.endswith(_TURNED) else tensor
        heads = self._heads_of(name)
        if heads is None:
            return tensor
        width = tensor.shape[0] // heads
        return tensor.reshape(heads, width // 2, 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)

    def _heads_of(self, name: str) -> int | None:
        """Return the heads whose channels llama.cpp rotates in neighbouring pairs; the others it rotates as we do."""
        if self.kind != gguf.MODEL_ARCH.LLAMA:
            return None
        heads = int(self.config["num_attention_heads"])
        if ".q_proj." in name:
            return heads
        return int(self.config.get("num_key_value_heads") or heads) if ".k_proj." in name else None

    def describe(self, writer: gguf.GGUFWriter, name: str) -> None:
        """Write sizes and constants."""
        config = self.config
        writer.add_name(name)
        writer.add_block_count(self.num_layers)
        writer.add_vocab_size(int(config["vocab_size"]))
        if self.kind == gguf.MODEL_ARCH.GPT2:
            writer.add_context_length(int(config["n_positions"]))
            writer.add_embedding_length(int(config["n_embd"]))
            writer.add_feed_forward_length(int(config.get("n_inner") or 4 * config["n_embd"]))
            writer.add_head_count(int(config["n_head"]))
            writer.add_layer_norm_eps(float(config.get("layer_norm_epsilon", 1e-5)))
            return
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        width = int(config.get("head_dim") or hidden // heads)
        writer.add_context_length(int(config["max_position_embeddings"]))
        writer.add_embedding_length(hidden)
        writer.add_feed_forward_length(int(config["intermediate_size"]))
        writer.add_head_count(heads)
        writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
        writer.add_layer_norm_rms_eps(float(config.get("rms_norm_eps", 1e-6)))
        writer.add_key_length(width)
        writer.add_value_length(width)
        writer.add_rope_dimension_count(width)
        writer.add_rope_freq_base(float(self._rope(config).get("rope_theta") or 10000.0))

    def extra_tensors(self) -> dict[str, Tensor]:
        """Return what no folder has as a tensor: by how much the frequencies of rotation are slowed."""
        rope = self._rope(self.config)
        if self.kind == gguf.MODEL_ARCH.GPT2 or rope.get("rope_type", "default") != "llama3":
            return {}
        heads = int(self.config["num_attention_heads"])
        width = int(self.config.get("head_dim") or int(self.config["hidden_size"]) // heads)
        base, factor = float(rope["rope_theta"]), float(rope["factor"])
        low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        original = float(rope["original_max_position_embeddings"])
        wavelengths = 2 * math.pi * base ** (np.arange(0, width, 2) / width)
        blend = np.clip((original / wavelengths - low) / (high - low), 0, 1)
        factors = 1 / ((1 - blend) / factor + blend)
        return {"rope_freqs.weight": torch.from_numpy(factors.astype(np.float32))}

    @staticmethod
    def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of the rotary embedding, as transformers 4 or 5 wrote them."""
        settings = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        settings.setdefault("rope_theta", config.get("rope_theta"))
        if "type" in settings:
            settings.setdefault("rope_type", settings["type"])
        return settings
