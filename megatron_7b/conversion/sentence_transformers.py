"""The files that make a folder of transformers one of sentence-transformers.

Source: what sentence-transformers 6.2 reads: `modules.json` names a chain of modules, each with a folder of its own.
"""

import json
from pathlib import Path

from megatron_7b.config.schema import RunConfig
from megatron_7b.conversion.json_files import read_json, write_json

_MODULES = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
_MODES = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken"}
_FURTHER_MODES = ("max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens")


def write_sentence_transformers(folder: Path, config: RunConfig) -> None:
    """Have `SentenceTransformer(folder)` encode texts as an embedding run has learned to.

    A tokenizer without a padding token gets its end of text for it: batches could not be filled up otherwise, and
    nothing attends to what fills them up.

    Args:
        folder: Model and tokenizer as transformers has them.
        config: Of the run.
    """
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{name}"}
        for number, (path, name) in enumerate(_MODULES)
    ]
    (folder / "modules.json").write_text(json.dumps(modules, indent=2) + "\n", encoding="utf-8")
    mode = _MODES[config.finetune.pooling]
    modes = {f"pooling_mode_{name}": name == mode for name in (*_MODES.values(), *_FURTHER_MODES)}
    for path, _ in _MODULES[1:]:
        (folder / path).mkdir()
    width = {"word_embedding_dimension": config.model.hidden_size}
    write_json(folder / "1_Pooling" / "config.json", {**width, **modes, "include_prompt": True})
    write_json(
        folder / "sentence_bert_config.json",
        {"max_seq_length": config.model.max_position_embeddings, "do_lower_case": False},
    )
    write_json(
        folder / "config_sentence_transformers.json",
        {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )
    settings_file = folder / "tokenizer_config.json"
    if settings_file.is_file():
        settings = read_json(settings_file)
        if settings.get("pad_token") is None and settings.get("eos_token") is not None:
            write_json(settings_file, {**settings, "pad_token": settings["eos_token"]})
