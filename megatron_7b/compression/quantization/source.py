"""The model that is quantised: a Hugging Face folder, or a checkpoint that is written as one first."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_7b.checkpoint import read_config, read_manifest, resolve_checkpoint, tokenizer_path
from megatron_7b.config.schema import ModelConfig
from megatron_7b.conversion import (
    ExportOptions,
    HuggingFaceFolder,
    export_to_hugging_face,
    plan_weights,
    to_hugging_face_config,
)
from megatron_7b.conversion.json_files import read_json
from megatron_7b.conversion.progress import Report
from megatron_7b.errors import ConfigError, ConversionError
from megatron_7b.files import remove_any
from megatron_7b.model.parameters import Shape

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class Source:
    """The model that is quantised, known by its configuration before any weights are read.

    Attributes:
        path: A checkpoint of any layout, or a Hugging Face folder.
        is_checkpoint: Which of them it is.
        config: What its config.json holds, or that of its export will.
        shapes: Of its tensors, by Hugging Face's names.
        tokenizer: Folder of its tokenizer.
    """

    path: Path
    is_checkpoint: bool
    config: Mapping[str, object]
    shapes: Mapping[str, Shape]
    tokenizer: Path | None

    @classmethod
    def read(cls, checkpoint: Path | None, hf: Path | None) -> "Source":
        """Return a checkpoint or a folder, one of which is given.

        Raises:
            CheckpointError: The checkpoint is damaged.
            ConfigError: Neither or both are given, the checkpoint is one of an adapter, or the model is no decoder.
            ConversionError: The folder cannot be read, or transformers has no such model.
        """
        if (checkpoint is None) == (hf is None):
            raise ConfigError(
                "a model is given by --checkpoint C, or by --hf FOLDER"
                + ("" if checkpoint is None else "; this command has both")
            )
        if hf is not None:
            folder = _checked(hf)
            return cls(hf, False, folder.config, folder.shapes, hf)
        assert checkpoint is not None
        path = resolve_checkpoint(checkpoint)
        manifest, model = read_manifest(path), read_config(path).model
        if manifest.base is not None:
            raise ConfigError(
                f"{path} holds an adapter, and what is quantised is a whole model",
                hint=f"megatron-7b convert to-hf --merge --checkpoint {path} --output MERGED, then --hf MERGED",
            )
        _check_model(path, model)
        shapes: dict[str, Shape] = {}
        for entry in plan_weights(model, manifest.vocab_size):
            shapes.update(zip(entry.hugging_face, entry.mapping.hugging_face_shapes, strict=True))
        config = to_hugging_face_config(model, vocab_size=manifest.vocab_size, dtype=manifest.params_dtype)
        return cls(path, True, config, shapes, tokenizer_path(path))

    @contextlib.contextmanager
    def opened(self, beside: Path, report: Report) -> Iterator[HuggingFaceFolder]:
        """Yield the model as a Hugging Face folder, for the duration of a with block.

        Args:
            beside: Where the output will be; a checkpoint is exported into a hidden folder there.
            report: Takes what is being done.

        Raises:
            ConversionError: The export fails.
        """
        if not self.is_checkpoint:
            yield HuggingFaceFolder(self.path)
            return
        beside.parent.mkdir(parents=True, exist_ok=True)
        room = Path(tempfile.mkdtemp(prefix=f".{beside.name}.export-", suffix=".tmp", dir=beside.parent))
        try:
            export_to_hugging_face(self.path, room / "model", ExportOptions(), report)
            yield _checked(room / "model")
        finally:
            with contextlib.suppress(OSError):
                remove_any(room)


def _check_model(folder: Path, model: ModelConfig) -> None:
    if model.num_moe_experts:
        raise _of_experts(folder, model.architecture)
    if model.has_head or model.traits.kind != "decoder":
        what = f"a head for {model.head}" if model.has_head else f"an {model.traits.kind.replace('_', '-')}"
        raise ConfigError(f"{folder} holds {what} ({model.architecture}), expected a decoder that predicts tokens")


def _of_experts(path: Path, name: object) -> ConfigError:
    return ConfigError(
        f"{path} is a mixture of experts ({name}), whose experts transformers stores as one tensor: they are not "
        "quantised here",
        hint="llm-compressor and llama.cpp's own converter quantise mixtures of experts",
    )


def _checked(path: Path) -> HuggingFaceFolder:
    _refuse_quantized(path)
    folder = HuggingFaceFolder(path)
    architectures = folder.config.get("architectures")
    name = folder.config.get("model_type")
    if any(folder.config.get(key) for key in _EXPERTS):
        raise _of_experts(path, name)
    if not isinstance(architectures, list) or not any(
        str(one).endswith(("ForCausalLM", "LMHeadModel")) for one in architectures
    ):
        raise ConfigError(
            f"{path} holds {architectures or name}, expected a decoder with an output layer (…ForCausalLM)",
            hint="encoders, encoder-decoders and classifiers are not quantised",
        )
    return folder


def _refuse_quantized(path: Path) -> None:
    config = path / "config.json"
    if config.is_file() and (found := read_json(config).get("quantization_config")):
        method = found.get("quant_method", "some method") if isinstance(found, dict) else "some method"
        raise ConversionError(
            f"{path} is quantised already, by {method}", hint="quantise the folder that it was made from"
        )


def copy_companions(source: Path, target: Path) -> None:
    """Copy everything of a folder but weights and code: the tokenizer, its template, settings of generation."""
    for file in sorted(source.iterdir()):
        is_weight = file.name.endswith(
            (".safetensors", ".safetensors.index.json", ".bin", ".gguf", ".py", ".pt", ".pth")
        )
        if file.is_file() and not is_weight and not file.name.startswith("."):
            shutil.copyfile(file, target / file.name)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, target / templates.name)
