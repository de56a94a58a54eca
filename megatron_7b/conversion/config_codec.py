"""What a family of architectures says about its config.json."""

from collections.abc import Mapping
from typing import Protocol

from megatron_7b.config.schema import ModelConfig
from megatron_7b.conversion.config_values import ValueReader


class ConfigCodec(Protocol):
    """Between the keys of config.json that describe a model, and `ModelConfig`."""

    @property
    def defaults(self) -> Mapping[str, object]:
        """What transformers assumes for a key that config.json leaves out."""

    @property
    def read_only_keys(self) -> frozenset[str]:
        """Keys that are read, and then written in another form or not at all."""

    def read(
        self, values: Mapping[str, object], reader: ValueReader, *, architecture: str, context: int | None
    ) -> ModelConfig:
        """Read the shape of a model.

        Args:
            values: config.json over the defaults.
            reader: Of these values; collects what is wrong with them.
            architecture: The model_type.
            context: Replaces the context length; None keeps it.
        """

    def unrepresentable(self, values: Mapping[str, object]) -> list[str]:
        """List what the values ask for and the model does not compute."""

    def impossible(self, values: Mapping[str, object], model: ModelConfig) -> list[str]:
        """List what is wrong with a model that was read, where every single value is right."""

    def write(self, model: ModelConfig) -> dict[str, object]:
        """Return the keys that describe a model, but for its vocabulary."""

    def unwritable(self, model: ModelConfig) -> list[str]:
        """List what the architecture of a model cannot have, beside the options that are fixed in it."""
