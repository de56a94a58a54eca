"""What the preparation of a task's data takes, and what it returns."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_7b.config import RunConfig
from megatron_7b.tokenizer import Tokenizer

type Report = Callable[[str, str], None]


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """A task's data are to be prepared.

    Attributes:
        config: The run as the user gave it, with the model of the weights.
        tokenizer: Of the weights.
        start: The Hugging Face folder or checkpoint that the run starts from.
        run_dir: The run folder.
        report: Takes what is being done.
        make: Make what is missing; otherwise it is found or a FileNotFoundError is raised.
    """

    config: RunConfig
    tokenizer: Tokenizer
    start: Path
    run_dir: Path
    report: Report
    make: bool

    @property
    def data_folder(self) -> Path:
        """Where what is made of data is put."""
        return self.run_dir / "data"


@dataclass(frozen=True)
class PreparedData:
    """What a run reads.

    Attributes:
        train: The blend of corpora, as `data.train` has it.
        valid: The same for validation; empty: a share of `train`.
        tokenizer: Folder of another tokenizer than that of the weights (one with a chat template); None: it is theirs.
        settings: What else the data decide of the configuration, by dotted path, such as the number of labels.
    """

    train: tuple[str, ...]
    valid: tuple[str, ...]
    tokenizer: Path | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
