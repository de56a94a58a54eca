"""What weights and activations can be stored and computed in. Needs no torch."""

import difflib
from dataclasses import dataclass, replace
from typing import Literal

from megatron_7b.errors import ConfigError

type Method = Literal["rtn", "gptq", "awq"]

METHODS: tuple[Method, ...] = ("rtn", "gptq", "awq")
GGUF_PREFIX = "gguf:"
GGUF_TYPES = ("f16", "bf16", "q8_0", "q4_0", "q4_k_m", "q6_k")


@dataclass(frozen=True)
class Scheme:
    """Numbers that matrices of a compressed-tensors folder are stored in.

    Attributes:
        name: As users spell it.
        num_bits: Of a weight.
        is_float: FP8 (E4M3) rather than whole numbers.
        group_size: Consecutive inputs of a row that share a scale; None: the whole row does.
        rounds_inputs: Whether the layer's inputs become numbers of as many bits too, with a scale per token.
        methods: By which weights can be rounded.
    """

    name: str
    num_bits: int
    is_float: bool
    group_size: int | None
    rounds_inputs: bool
    methods: tuple[Method, ...]

    @property
    def largest(self) -> float:
        """The number that the largest weight of a group stands for, half a step beyond the last one."""
        return 448.0 if self.is_float else (2**self.num_bits - 1) / 2


SCHEMES: dict[str, Scheme] = {
    "w8a16": Scheme("w8a16", 8, False, None, False, METHODS),
    "w8a8": Scheme("w8a8", 8, False, None, True, METHODS),
    "w4a16": Scheme("w4a16", 4, False, 128, False, METHODS),
    "fp8": Scheme("fp8", 8, True, None, True, ("rtn",)),
}


def parse_scheme(name: str, group_size: int | None = None) -> Scheme | str:
    """Return what a name stands for.

    Args:
        name: Such as w4a16 or gguf:q8_0.
        group_size: Instead of the scheme's own.

    Returns:
        A scheme, or the type of a GGUF file.

    Raises:
        ConfigError: There is no such scheme, or it has no groups.
    """
    if name.startswith(GGUF_PREFIX):
        kind = name.removeprefix(GGUF_PREFIX).lower()
        if kind not in GGUF_TYPES:
            raise ConfigError(
                f"unknown scheme {name!r}, expected {GGUF_PREFIX}{{{','.join(GGUF_TYPES)}}}{_guess(name)}"
            )
        if group_size is not None:
            raise ConfigError(
                f"--group-size {group_size} does not apply to {name}, whose blocks are part of the format",
                hint="leave it out",
            )
        return kind
    if name not in SCHEMES:
        raise ConfigError(
            f"unknown scheme {name!r}, expected {', '.join(SCHEMES)} or "
            f"{GGUF_PREFIX}{{{','.join(GGUF_TYPES)}}}{_guess(name)}"
        )
    scheme = SCHEMES[name]
    if group_size is None:
        return scheme
    if group_size < 1:
        raise ConfigError(f"--group-size is {group_size}, expected 1 or more")
    if scheme.rounds_inputs:
        raise ConfigError(
            f"--group-size {group_size} does not apply to {name}: its products are summed in whole rows before they "
            "are scaled, so that a row has one scale",
            hint="leave it out, or use w8a16 or w4a16",
        )
    return replace(scheme, group_size=group_size)


def check_method(scheme: Scheme | str, method: str) -> None:
    """Refuse a way of rounding that a scheme does not have.

    Raises:
        ConfigError: That is so.
    """
    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r}, expected {', '.join(METHODS)}")
    if isinstance(scheme, str):
        if method != "rtn":
            raise ConfigError(f"GGUF files are rounded block by block, so --method {method} does not apply")
    elif method not in scheme.methods:
        raise ConfigError(
            f"--method {method} does not apply to {scheme.name}, whose steps grow with the value: rounding to nearest "
            "is what it needs",
            hint="leave it out",
        )


def check_groups(scheme: Scheme, widths: dict[str, int]) -> None:
    """Refuse a group size that does not divide the rows of every matrix.

    Args:
        scheme: What is chosen.
        widths: Inputs of every matrix, by name.

    Raises:
        ConfigError: It does not; the message says which do.
    """
    size = scheme.group_size
    unfit = {name: width for name, width in widths.items() if size is not None and width % size}
    if not unfit or size is None:
        return
    fit = [one for one in (256, 128, 96, 64, 48, 32, 24, 16, 8) if all(width % one == 0 for width in widths.values())]
    name, width = min(unfit.items())  # whichever order a file has them in
    raise ConfigError(
        f"groups of {size} do not divide the {width:,} inputs of {name}"
        + (f" (and {len(unfit) - 1} more)" if len(unfit) > 1 else ""),
        hint=f"--group-size {fit[0]} does" + (f"; so do {', '.join(map(str, fit[1:]))}" if fit[1:] else "")
        if fit
        else "no usual group size divides all rows: use w8a16, which has one scale per row",
    )


def _guess(name: str) -> str:
    known = (*SCHEMES, *(GGUF_PREFIX + kind for kind in GGUF_TYPES))
    close = difflib.get_close_matches(name.lower().replace("-", "_"), known, n=1)
    return f"; did you mean {close[0]}?" if close else ""
