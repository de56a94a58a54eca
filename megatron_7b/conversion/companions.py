"""What an imported folder holds beside its weights: gathered for the checkpoint, and given back by an export.

Everything small goes out as it came in: tokenizer, chat templates, generation settings, licence, model card. Of
config.json, which describes the model, the keys go out that do not concern its shape.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from megatron_7b.checkpoint.companions import Companions
from megatron_7b.checkpoint.records import HUGGING_FACE, TOKENIZER
from megatron_7b.config.schema import ModelConfig
from megatron_7b.conversion.folder_reader import CONFIG_FILE, GENERATION_CONFIG_FILE
from megatron_7b.conversion.hf_config import SpecialTokens, to_generation_config, to_hugging_face_config
from megatron_7b.conversion.hf_tokenizer import copy_tokenizer
from megatron_7b.conversion.json_files import read_json, write_json
from megatron_7b.tokenizer import load_tokenizer

_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz", ".pkl"),
    *(".safetensors.index.json", ".bin.index.json", ".h5.index.json"),
)
_CODE = (".py", ".so", ".sh")
_LARGEST = 16 * 2**20
"""Bytes; every checkpoint of a run carries its companions."""


@dataclass(frozen=True)
class Gathered:
    """What was gathered from a folder.

    Attributes:
        companions: Where it is now.
        left: Files and folders that are neither weights nor companions, and are left out.
    """

    companions: Companions
    left: tuple[str, ...]


def gather_companions(source: Path, target: Path) -> Gathered:
    """Copy the companions of a Hugging Face folder.

    Args:
        source: The folder.
        target: An existing, empty folder, which receives `tokenizer/` and `hugging_face/`.
    """
    (target / TOKENIZER).mkdir()
    (target / HUGGING_FACE).mkdir()
    of_tokenizer = copy_tokenizer(source, target / TOKENIZER)
    if of_tokenizer:
        # The family of the model has a say in which ids transformers gives, so the tokenizer comes with it.
        shutil.copyfile(source / CONFIG_FILE, target / TOKENIZER / CONFIG_FILE)
    else:
        (target / TOKENIZER).rmdir()
    left = []
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or path.name in of_tokenizer or path.name.endswith(_WEIGHTS):
            continue
        if path.is_file() and not path.name.endswith(_CODE) and path.stat().st_size <= _LARGEST:
            shutil.copyfile(path, target / HUGGING_FACE / path.name)
        elif not any(name.startswith(f"{path.name}/") for name in of_tokenizer):
            left.append(f"{path.name}/" if path.is_dir() else path.name)
    return Gathered(Companions.of(target), tuple(left))


def give_back_companions(
    companions: Companions, folder: Path, *, model: ModelConfig, vocab_size: int, dtype: str
) -> None:
    """Write everything but weights and tokenizer: config.json, generation_config.json, and what an import brought.

    Args:
        companions: Of the checkpoint.
        folder: The folder in the making.
        model: Shape of the model.
        vocab_size: True vocabulary size.
        dtype: What the weights are stored in, in torch's spelling.
    """
    if companions.hugging_face is not None:
        for file in companions.hugging_face.iterdir():
            shutil.copyfile(file, folder / file.name)
    imported = imported_config(companions)
    special_tokens = None
    if imported is None:
        special_tokens = _special_tokens(companions.tokenizer, model)
        if model.traits.kind != "encoder":
            write_json(folder / GENERATION_CONFIG_FILE, to_generation_config(special_tokens))
    config = to_hugging_face_config(
        model, vocab_size=vocab_size, dtype=dtype, special_tokens=special_tokens, imported=imported
    )
    write_json(folder / CONFIG_FILE, config)


def imported_config(companions: Companions) -> dict[str, object] | None:
    """Return the config.json that the weights came with, or None if they come from no import."""
    file = companions.hugging_face / CONFIG_FILE if companions.hugging_face is not None else None
    return read_json(file) if file is not None and file.is_file() else None


def _special_tokens(tokenizer: Path | None, model: ModelConfig) -> SpecialTokens:
    if tokenizer is None:
        return SpecialTokens()
    ours = load_tokenizer(tokenizer)
    if model.traits.kind == "encoder_decoder":
        pad = ours.special_id("pad")
        return SpecialTokens(eos_token_id=ours.eod_id, pad_token_id=pad, decoder_start_token_id=pad)
    return SpecialTokens(bos_token_id=ours.bos_id, eos_token_id=ours.eod_id, pad_token_id=ours.pad_id)
