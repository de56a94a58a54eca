"""transformers as the reference: whatever it raises is about the folder at hand, and is reported as that."""

import contextlib
from collections.abc import Iterator

from megatron_7b.errors import ConversionError, MegatronError


@contextlib.contextmanager
def reported(what: str) -> Iterator[None]:
    """Turn any exception of a library into an error that says what failed, for the duration of a with block.

    Which exceptions transformers raises depends on the folder: its code runs on whatever config.json and
    tokenizer.json say, so that a wrong value may surface as any of Python's.

    Args:
        what: Begins the message, such as "transformers cannot load FOLDER".

    Raises:
        ConversionError: The block has raised an exception.
    """
    try:
        yield
    except MegatronError:
        raise
    except Exception as error:
        out_of_memory = isinstance(error, MemoryError) or "out of memory" in str(error).lower()
        raise ConversionError(
            f"{what}: {type(error).__name__}: {error}",
            hint="--parity-dtype bf16 halves the memory of the comparison"
            if out_of_memory
            else "transformers is the reference for what a folder means; the folder itself has to be corrected",
        ) from error
