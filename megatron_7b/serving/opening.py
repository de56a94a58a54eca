"""Opening the models of a server: what its names stand for is read first, then all ranks load them."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_7b.checkpoint import resolve_checkpoint, tokenizer_path
from megatron_7b.checkpoint.base import find_base
from megatron_7b.checkpoint.inference_config import inference_config
from megatron_7b.config import RunConfig
from megatron_7b.errors import ConfigError
from megatron_7b.generation.setup import REQUIREMENTS, read_setup
from megatron_7b.prediction.predicting import prediction_setup
from megatron_7b.serving.served import ServedModel
from megatron_7b.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from megatron_7b.serving.models import Model


@dataclass(frozen=True)
class NamedAdapter:
    """An adapter under the name by which clients ask for it.

    Attributes:
        name: The name.
        folder: Checkpoint of the adapter.
    """

    name: str
    folder: Path

    @classmethod
    def parse(cls, text: str) -> "NamedAdapter":
        """Read `NAME=CHECKPOINT`, or `CHECKPOINT` alone, which has its folder's name.

        Raises:
            ConfigError: The name is empty.
        """
        name, has_name, folder = text.partition("=")
        if not has_name:
            return cls(name_of(resolve_checkpoint(Path(text))), Path(text))
        if not name or not folder:
            raise ConfigError(f"--adapter {text!r}, expected NAME=CHECKPOINT, or CHECKPOINT")
        return cls(name, Path(folder))


def name_of(folder: Path) -> str:
    """Return the name of a checkpoint's model: that of its run, or of the folder itself."""
    folder = folder.resolve()
    return folder.parents[1].name if folder.parent.name == "checkpoints" else folder.name


def read_models(
    folder: Path,
    config: RunConfig,
    *,
    name: str,
    tokenizer: Path | None = None,
    adapters: Sequence[NamedAdapter] = (),
    overrides: Mapping[str, object] | None = None,
) -> list[ServedModel]:
    """Read what a server serves, and refuse what cannot be.

    Args:
        folder: A complete checkpoint.
        config: Of it, for inference.
        name: By which clients ask for it.
        tokenizer: Instead of the one that the checkpoint carries.
        adapters: Trained beside this checkpoint.
        overrides: Options of the command line.

    Raises:
        CheckpointError: A checkpoint is damaged.
        ConfigError: A model can neither write texts nor label them nor give them vectors, or an adapter does not fit.
    """
    models = [_read_model(0, name, folder, config, tokenizer)]
    for number, adapter in enumerate(adapters, 1):
        if models[0].setup is None:
            raise ConfigError("--adapter is for models that write texts", hint="serve the other checkpoint on its own")
        of_adapter = resolve_checkpoint(adapter.folder)
        if adapter.name in {model.name for model in models}:
            raise ConfigError(f"two models are called {adapter.name!r}", hint="--adapter NAME=CHECKPOINT names one")
        base = find_base(of_adapter, folder)
        if base is None:
            raise ConfigError(f"--adapter {of_adapter} holds a whole model", hint="serve it on its own: --checkpoint")
        if base.resolve() != folder.resolve():
            raise ConfigError(
                f"--adapter {of_adapter} was trained beside {base}, not beside {folder}",
                hint=f"--checkpoint {base} serves it",
            )
        given = {**(overrides or {}), "checkpoint.initialize_from": str(folder)}
        of_config = inference_config(of_adapter, given, requirements=REQUIREMENTS)
        model = _read_model(number, adapter.name, of_adapter, of_config, tokenizer)
        models.append(dataclasses.replace(model, parent=name))
    return models


def _read_model(number: int, name: str, folder: Path, config: RunConfig, tokenizer: Path | None) -> ServedModel:
    if config.model.has_head:
        return ServedModel(number, name, config, folder, task=prediction_setup(folder, config).task)
    if not writes_texts(config):
        path = tokenizer or tokenizer_path(folder)
        if config.objective_name != "embedding":
            raise ConfigError(
                f"{folder} holds a model of kind {config.model.traits.kind} that was trained for "
                f"{config.objective_name}: it can neither write texts nor label them",
                hint="--objective.name embedding serves its vectors",
            )
        if path is None:
            raise ConfigError(f"{folder} carries no tokenizer", hint="name one with --tokenizer DIR")
        return ServedModel(number, name, config, folder, tokenizer=load_tokenizer(path))
    return ServedModel(number, name, config, folder, setup=read_setup(folder, config, tokenizer))


def writes_texts(config: RunConfig) -> bool:
    """Whether a checkpoint's model writes texts."""
    return (
        not config.model.has_head
        and config.objective_name != "embedding"
        and config.model.traits.kind in ("decoder", "encoder_decoder")
    )


@contextlib.contextmanager
def opened_models(served: Sequence[ServedModel], *, fp32_on_cpu: bool, max_batch_size: int) -> "Iterator[list[Model]]":
    """Load all models on this rank, for the duration of a with block.

    Weights that models have in common, those beside which adapters were trained, are held once.

    Raises:
        CheckpointError: One is damaged.
        ConfigError: They do not fit the ranks, or into memory.

    Collective: all ranks.
    """
    from megatron_7b.checkpoint.open_model import opened_model
    from megatron_7b.generation.session import Session
    from megatron_7b.serving.models import EmbeddingModel, LabellingModel, WritingModel

    first = served[0]
    with contextlib.ExitStack() as stack:
        models: list[Model] = []
        if first.setup is None:
            model = stack.enter_context(opened_model(first.folder, first.config, fp32_on_cpu=fp32_on_cpu))
            if first.task is not None:
                models.append(LabellingModel(model, first.task))
            else:
                assert first.tokenizer is not None
                models.append(EmbeddingModel(model, first.tokenizer))
        else:
            session: Session | None = None
            for one in served:
                assert one.setup is not None
                opened = Session(
                    one.setup,
                    fp32_on_cpu=fp32_on_cpu,
                    max_batch_size=max_batch_size,
                    several_copies=True,
                    beside=session,
                )
                stack.enter_context(opened)
                session = session or opened
                models.append(WritingModel(opened))
        yield models
