"""A tokenizer trained on files: all that `megatron-7b tokenizer train` does."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_7b.data.reading.progress import OpenProgress, ReadingProgress, tell_nobody
from megatron_7b.data.reading.records import BadRecord
from megatron_7b.data.reading.sources import find_sources
from megatron_7b.data.reading.spread import SpreadReader
from megatron_7b.errors import ConfigError
from megatron_7b.runtime.output_paths import check_folder_to_write
from megatron_7b.tokenizer.bpe_options import BpeOptions, check_bpe_options


@dataclass(frozen=True)
class TrainedTokenizer:
    """What came of it.

    Attributes:
        folder: The Hugging Face folder that was written.
        vocab_size: Tokens; fewer than asked for if the text has too few pairs.
        input_bytes: Size of all files, sampled or not.
        bad: Records that were left out.
    """

    folder: Path
    vocab_size: int
    input_bytes: int
    bad: list[BadRecord]


def train_tokenizer(
    inputs: Sequence[str | Path],
    folder: str | Path,
    options: BpeOptions,
    *,
    key: str = "text",
    sample_mb: float | None = None,
    overwrite: bool = False,
    open_progress: OpenProgress = tell_nobody,
) -> TrainedTokenizer:
    """Train a byte-pair encoding on files, and write it as a Hugging Face folder.

    Args:
        inputs: Files, globs or folders of text, as `preprocess` reads them.
        folder: Where to write.
        options: What the vocabulary shall be: `tokenizer.BpeOptions`.
        key: Key of a record that holds the text.
        sample_mb: Train on this much of the input [MB], evenly spread; None trains on all of it.
        overwrite: Replace a tokenizer that is there.
        open_progress: Shows how far it is.

    Raises:
        ConfigError: Options are impossible, the folder holds a tokenizer, or there is no such input.
        DataFormatError: A file is damaged as a whole, or there is no text.
    """
    folder = Path(folder)
    check_bpe_options(options)
    check_folder_to_write(folder, "the output folder")
    if (folder / "tokenizer.json").exists() and not overwrite:
        raise ConfigError(f"{folder} already holds a tokenizer", hint="--overwrite replaces it")
    reader = SpreadReader(find_sources([str(one) for one in inputs]), sample_mb)
    bad: list[BadRecord] = []
    from megatron_7b.tokenizer.train import save_hugging_face_folder, train_bpe

    with open_progress(reader.total_bytes) as progress:
        tokenizer = train_bpe(_read_texts(reader, key, bad, progress), options)
    save_hugging_face_folder(tokenizer, options, folder)
    return TrainedTokenizer(folder, tokenizer.get_vocab_size(), reader.total_bytes, bad)


def _read_texts(
    reader: SpreadReader, key: str, bad: list[BadRecord], progress: ReadingProgress | None
) -> Iterator[list[str]]:
    documents = characters = 0
    for _, block in reader.read_blocks([key]):
        bad += block.bad
        documents += len(block.numbers)
        characters += sum(map(len, block.texts[0]))
        if progress is not None:
            progress.update(reader.bytes_read, documents, characters // 4)
        yield block.texts[0]
