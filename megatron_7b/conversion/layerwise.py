"""A Hugging Face decoder of which one layer at a time is in memory, computed by transformers' own modules.

For whatever goes through a model once, layer by layer, however large it is: all samples pass through the embedding,
then all through the first layer, and so on. Weights are read as a stage needs them, and are let go with it.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_7b.conversion.folder_reader import HuggingFaceFolder
from megatron_7b.conversion.reference import reported
from megatron_7b.errors import ConversionError

_LAYERS = ("layers", "h")
_LAST_NORM = ("norm", "ln_f")
_HEAD = "lm_head"


class _Recorder(nn.Module):
    """Stands in a layer's place: hands the hidden states on, and remembers what the layer would have been given."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.attention_type = getattr(layer, "attention_type", "full_attention")
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def forward(self, hidden: Tensor, *arguments: Any, **named: Any) -> Tensor:
        """Return the hidden states as they are."""
        self.arguments = (arguments, named)
        return hidden


class LastStage(nn.Module):
    """The last norm and the output layer."""

    def __init__(self, norm: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.norm, self.lm_head = norm, head

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the logits."""
        return cast("Tensor", self.lm_head(self.norm(hidden)))


class LayerwiseDecoder:
    """A decoder in FP32 whose stages are loaded one after the other.

    Attributes:
        folder: Where its weights are.
        config: transformers' configuration.
        num_layers: Layers.
        is_tied: Whether the output layer is the word embedding.

    Args:
        folder: A folder with a causal language model.
        device: Where to compute.

    Raises:
        ConversionError: transformers cannot make sense of the folder, or it is of another kind.
    """

    def __init__(self, folder: HuggingFaceFolder, device: torch.device | str = "cpu") -> None:
        self.folder = folder
        self._device = torch.device(device)
        with reported(f"transformers cannot build the model of {folder.path}"), torch.device("meta"):
            self.config = AutoConfig.from_pretrained(folder.path)
            model = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)
        self._model = model.eval()
        self._prefix = model.base_model_prefix
        self._base = getattr(model, self._prefix)
        self._layers_name = next((name for name in _LAYERS if hasattr(self._base, name)), "")
        self._norm_name = next((name for name in _LAST_NORM if hasattr(self._base, name)), "")
        if not self._layers_name or not self._norm_name:
            raise ConversionError(f"{folder.path}: {type(model).__name__} is not built as decoders are")
        self._layers = list(getattr(self._base, self._layers_name))
        self._recorders = [_Recorder(layer) for layer in self._layers]
        self.num_layers = len(self._layers)
        self.is_tied = bool(getattr(self.config, "tie_word_embeddings", False)) or f"{_HEAD}.weight" not in folder

    def layer_prefix(self, number: int) -> str:
        """Return the beginning of the names of a layer's tensors."""
        return f"{self._prefix}.{self._layers_name}.{number}."

    @property
    def norm_prefix(self) -> str:
        """The beginning of the names of the last norm's tensors."""
        return f"{self._prefix}.{self._norm_name}."

    def first_names(self) -> list[str]:
        """Return the names of the tensors before the first layer."""
        others = (f"{self._prefix}.{self._layers_name}.", self.norm_prefix, f"{_HEAD}.")
        return [name for name in self.folder if not name.startswith(others)]

    @torch.inference_mode()
    def embed(self, samples: list[list[int]], replaced: dict[str, Tensor] | None = None) -> Tensor:
        """Return the hidden states before the first layer, and note what layers are given beside them.

        Args:
            samples: Equally many token ids each, [n][s].
            replaced: Tensors that take the place of the folder's.

        Returns:
            [n, s, h]
        """
        base = self._base
        layers, norm = getattr(base, self._layers_name), getattr(base, self._norm_name)
        for name, child in base.named_children():
            if name in (self._layers_name, self._norm_name):
                continue
            if any(True for _ in child.parameters()):
                self._load(child, f"{self._prefix}.{name}.", replaced)
            elif any(True for _ in child.buffers()):  # tables of angles, which no folder holds
                setattr(base, name, type(child)(config=self.config).to(self._device))
        setattr(base, self._layers_name, nn.ModuleList(self._recorders))
        setattr(base, self._norm_name, nn.Identity())
        try:
            hidden = [self._embed_one(base, sample) for sample in samples]
        finally:
            setattr(base, self._layers_name, layers)
            setattr(base, self._norm_name, norm)
            for name, child in base.named_children():
                if name not in (self._layers_name, self._norm_name):
                    child.to("meta")
        return torch.cat(hidden)

    def _embed_one(self, base: nn.Module, sample: list[int]) -> Tensor:
        ids = torch.tensor([sample], device=self._device)
        return cast("Tensor", base(input_ids=ids, use_cache=False).last_hidden_state)

    @contextlib.contextmanager
    def layer(self, number: int) -> Iterator[nn.Module]:
        """Yield a layer with its weights, in FP32, for the duration of a with block."""
        layer = self._layers[number]
        self._load(layer, self.layer_prefix(number))
        try:
            yield layer
        finally:
            layer.to("meta")

    @torch.inference_mode()
    def run_layer(self, number: int, layer: nn.Module, hidden: Tensor, *, keeps_result: bool = True) -> None:
        """Take samples through a loaded layer; `embed` was called with samples of the same length before.

        Args:
            number: Which one it is.
            layer: From `layer`.
            hidden: [n, s, h]; holds the result afterwards.
            keeps_result: Otherwise it stays as it is; for what hooks see.
        """
        arguments, named = self._recorders[number].arguments
        for sample in range(len(hidden)):
            result = layer(hidden[sample : sample + 1], *arguments, **named)
            if keeps_result:
                hidden[sample : sample + 1] = result[0] if isinstance(result, tuple) else result

    @contextlib.contextmanager
    def last_stage(self, replaced: dict[str, Tensor] | None = None) -> Iterator[LastStage]:
        """Yield the last norm and the output layer with their weights, for the duration of a with block.

        Args:
            replaced: Tensors that take the place of the folder's.
        """
        norm = copy.deepcopy(getattr(self._base, self._norm_name))  # two such stages may be open at a time
        self._load(norm, self.norm_prefix)
        # a tied output layer is the embedding's parameter, and must not become the embedding's module
        head = nn.Linear(1, 1, bias=False, device="meta")
        source = f"{_HEAD}.weight" if not self.is_tied else self.embedding_name
        head.weight = nn.Parameter(self._read(source, replaced), requires_grad=False)
        head.out_features, head.in_features = head.weight.shape
        yield LastStage(norm, head)

    @property
    def embedding_name(self) -> str:
        """The name of the word embedding."""
        ending = "embed_tokens.weight" if self._layers_name == "layers" else "wte.weight"
        return f"{self._prefix}.{ending}"

    def _load(self, module: nn.Module, prefix: str, replaced: dict[str, Tensor] | None = None) -> None:
        state = {name: self._read(prefix + name, replaced) for name in module.state_dict()}
        module.load_state_dict(state, assign=True)
        module.requires_grad_(False)

    def _read(self, name: str, replaced: dict[str, Tensor] | None) -> Tensor:
        if replaced is not None and name in replaced:
            return replaced[name].to(self._device, torch.float32)
        if name not in self.folder:
            raise ConversionError(
                f"{self.folder.path} has no tensor {name}",
                hint="`megatron-7b convert from-hf`, then `to-hf`, writes it under today's names",
            )
        return self.folder[name].to(self._device, torch.float32)
