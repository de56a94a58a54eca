"""A corpus that nobody has to bring: short texts of made words, in bytes."""

import random
from pathlib import Path

from megatron_7b.config import RunConfig
from megatron_7b.errors import ConfigError

_NUM_WORDS = 200
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_SEED = 1234


def write_generated_corpus(folder: Path, config: RunConfig) -> dict[str, object]:
    """Write a corpus that suffices for some steps, and return the options that make a run read it.

    Args:
        folder: New folder.
        config: The run, for its sizes.

    Raises:
        ConfigError: The model's vocabulary is smaller than that of bytes.
    """
    from megatron_7b.data import PreprocessOptions, preprocess_files
    from megatron_7b.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("bytes")
    wanted = config.model.vocab_size
    if wanted is not None and wanted < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {wanted}, and generated text has {tokenizer.vocab_size} tokens",
            hint="--data.train PREFIX names a corpus of your own",
        )
    folder.mkdir()
    tokenizer_folder = folder / "tokenizer"
    tokenizer_folder.mkdir()
    tokenizer.save(tokenizer_folder)
    drawn = random.Random(_SEED)
    words = ["".join(drawn.choices(_LETTERS, k=drawn.randint(2, 9))) for _ in range(_NUM_WORDS)]
    samples = 8 * config.training.global_batch_size
    length = 0
    with (folder / "text.jsonl").open("w", encoding="utf-8") as stream:
        while length < samples * config.data.seq_length * 2:
            text = " ".join(drawn.choices(words, k=drawn.randint(5, 200)))
            length += len(text)
            stream.write(f'{{"text": "{text}"}}\n')
    report = preprocess_files(
        [str(folder / "text.jsonl")], str(folder / "corpus"), tokenizer, PreprocessOptions(append_eod=True)
    )
    return {"data.train": list(map(str, report.prefixes)), "data.tokenizer": str(tokenizer_folder)}
