"""How a model is quantised, and what is refused before anything is read. Needs no torch."""

import math
from dataclasses import dataclass
from pathlib import Path

from megatron_7b.compression.quantization.schemes import Method, Scheme, check_method, parse_scheme
from megatron_7b.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """How.

    Attributes:
        scheme: w8a16, w8a8, w4a16, fp8, or gguf: and a type of llama.cpp's.
        method: rtn rounds every weight by itself; gptq lets others make up for the error; awq scales matrices first.
        calibration: Text that gptq and awq look at; without held_out, perplexity is measured on a part of it.
        held_out: Text on which perplexity is measured.
        num_samples: Samples of the calibration text.
        seq_length: Tokens of a sample; None takes 512, or the model's context if that is shorter.
        num_held_out: Samples on which perplexity is measured.
        group_size: Weights that share a scale; None takes the scheme's.
        ignore: Names, or with `re:` before them patterns of names, of matrices that stay as they are.
        damping: Of gptq.
        act_order: Of gptq.
        max_loss: By which share perplexity may grow.
        force: Publish even if it grows more.
        overwrite: Replace an earlier output of this command.
        max_shard_bytes: Largest weight file.
    """

    scheme: str
    method: Method = "rtn"
    calibration: str | Path | None = None
    held_out: str | Path | None = None
    num_samples: int = 128
    seq_length: int | None = None
    num_held_out: int = 32
    group_size: int | None = None
    ignore: tuple[str, ...] = ("lm_head",)
    damping: float = 0.01
    act_order: bool = True
    max_loss: float = 0.1
    force: bool = False
    overwrite: bool = False
    max_shard_bytes: int = 4 * 2**30

    def check(self) -> Scheme | str:
        """Return the scheme.

        Raises:
            ConfigError: Something is impossible.
        """
        scheme = parse_scheme(self.scheme, self.group_size)
        check_method(scheme, self.method)
        if self.method != "rtn" and self.calibration is None:
            raise ConfigError(
                f"--method {self.method} looks at what the model computes on text",
                hint="--calibration F.jsonl gives it some; --method rtn needs none",
            )
        for flag, value in (("--num-samples", self.num_samples), ("--num-held-out", self.num_held_out)):
            if value < 1:
                raise ConfigError(f"{flag} is {value}, expected 1 or more")
        if self.seq_length is not None and self.seq_length < 2:
            raise ConfigError(f"--seq-length is {self.seq_length}, expected 2 or more")
        if not 0 < self.damping < 1:
            raise ConfigError(f"--damping is {self.damping:g}, expected more than 0 and less than 1")
        if not self.max_loss >= 0 or math.isinf(self.max_loss):
            raise ConfigError(f"--max-loss is {self.max_loss:g}, expected a share such as 0.1")
        if isinstance(scheme, str) and self.ignore != ("lm_head",):
            raise ConfigError("--ignore does not apply to GGUF files, whose types say what is stored in what")
        return scheme
