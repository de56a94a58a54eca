"""llama.cpp's blocks of numbers: the library writes simple ones; those of 256 numbers, which it only reads, are here.

**Source:** the layout is that of ggml's `block_q4_K` and `block_q6_K`, as gguf 0.19's `dequantize` reads it. How scales
are searched is ours: among some candidates, each with the least squares over the numbers of a block, the best one.
"""

import gguf
import numpy as np
from numpy.typing import NDArray

type Floats = NDArray[np.float32]
type Bytes = NDArray[np.uint8]

TYPES = gguf.GGMLQuantizationType
_SUPER = 256
"""Numbers of a block whose scales share a scale."""
_ROWS_AT_ONCE = 4096


def pack(values: Floats, kind: gguf.GGMLQuantizationType) -> NDArray[np.generic]:
    """Return numbers as they are in the file.

    Args:
        values: [..., n], with n a multiple of the type's block.
        kind: The type.
    """
    packers = {TYPES.Q4_K: _pack_q4, TYPES.Q6_K: _pack_q6}
    if kind not in packers:
        packed: NDArray[np.generic] = gguf.quants.quantize(np.ascontiguousarray(values, np.float32), kind)
        return packed
    blocks = np.ascontiguousarray(values, np.float32).reshape(-1, _SUPER)
    parts = [packers[kind](blocks[first : first + _ROWS_AT_ONCE]) for first in range(0, len(blocks), _ROWS_AT_ONCE)]
    return np.concatenate(parts).reshape(*values.shape[:-1], -1)


def unpack(packed: NDArray[np.generic], kind: gguf.GGMLQuantizationType) -> Floats:
    """Return the numbers that a file's stand for, as the library reads them."""
    values: Floats = gguf.quants.dequantize(packed, kind)
    return values


def _pack_q4(blocks: Floats) -> Bytes:
    """A scale and an offset of 6 bits for every 32 numbers, and 4 bits a number."""
    parts = blocks.reshape(-1, 8, 32)
    scales, offsets = _scales_and_offsets(parts, largest=15)
    scale, whole_scales = _share(scales, 63)
    offset, whole_offsets = _share(offsets, 63)
    steps_of = scale[:, None] * whole_scales
    moved = parts + (offset[:, None] * whole_offsets)[..., None]
    steps = np.clip(np.rint(_divide(moved, steps_of[..., None])), 0, 15).astype(np.uint8)
    low, high = whole_scales.astype(np.uint8), whole_offsets.astype(np.uint8)
    packed_scales = np.concatenate(
        [
            low[:, :4] | (low[:, 4:] >> 4) << 6,
            high[:, :4] | (high[:, 4:] >> 4) << 6,
            (low[:, 4:] & 15) | (high[:, 4:] & 15) << 4,
        ],
        axis=1,
    )
    pairs = steps.reshape(-1, 4, 2, 32)
    packed_steps = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)
    return np.concatenate([_half(scale), _half(offset), packed_scales, packed_steps], axis=1)


def _pack_q6(blocks: Floats) -> Bytes:
    """A scale of 8 bits for every 16 numbers, and 6 bits a number."""
    parts = blocks.reshape(-1, 16, 16)
    scales = _scales(parts, largest=32)
    scale, whole = _share(scales, 127)
    steps_of = (scale[:, None] * whole)[..., None]
    steps = (np.clip(np.rint(_divide(parts, steps_of)), -32, 31) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low = steps[:, :, :2] & 15 | (steps[:, :, 2:] & 15) << 4
    top = steps >> 4
    high = top[:, :, 0] | top[:, :, 1] << 2 | top[:, :, 2] << 4 | top[:, :, 3] << 6
    whole_bytes = whole.astype(np.int8).view(np.uint8)
    return np.concatenate([low.reshape(-1, 128), high.reshape(-1, 64), whole_bytes, _half(scale)], axis=1)


def _scales_and_offsets(parts: Floats, largest: int) -> tuple[Floats, Floats]:
    """Return, for each part, the scale and the offset (not negative, subtracted) that lose least."""
    least, most = np.minimum(parts.min(-1), 0), np.maximum(parts.max(-1), 0)
    span = np.maximum(most - least, 1e-30)
    weights = np.abs(parts) + np.sqrt((parts**2).mean(-1, keepdims=True))
    best = np.full(least.shape, np.inf, np.float32)
    scales, offsets = span / largest, -least
    for reach in np.arange(largest - 1.0, largest + 1.05, 0.1).tolist():
        steps = np.clip(np.rint((parts - least[..., None]) * (reach / span)[..., None]), 0, largest)
        sums = [(weights * one).sum(-1) for one in (np.ones_like(steps), steps, steps**2, parts, parts * steps)]
        ones, first, second, values, products = sums
        determinant = ones * second - first**2
        scale = _divide(ones * products - first * values, determinant)
        offset = _divide(second * values - first * products, determinant)
        above = offset > 0  # only what is subtracted can be stored
        scale, offset = np.where(above, _divide(products, second), scale), np.where(above, 0, offset)
        error = (weights * (scale[..., None] * steps + offset[..., None] - parts) ** 2).sum(-1)
        better = (error < best) & (scale > 0)
        best, scales = np.where(better, error, best), np.where(better, scale, scales)
        offsets = np.where(better, -offset, offsets)
    return scales.astype(np.float32), offsets.astype(np.float32)


def _scales(parts: Floats, largest: int) -> Floats:
    """Return, for each part, the scale (of either sign) that loses least."""
    place = np.abs(parts).argmax(-1)[..., None]
    extreme = np.take_along_axis(parts, place, -1)[..., 0]
    best = np.full(extreme.shape, np.inf, np.float32)
    scales = np.zeros_like(extreme)
    weights = np.square(parts)
    for reach in np.arange(largest - 0.9, largest + 1.0, 0.1).tolist():
        steps = np.clip(np.rint(parts * _divide(-reach, extreme)[..., None]), -largest, largest - 1)
        scale = _divide((weights * parts * steps).sum(-1), (weights * steps**2).sum(-1))
        error = (weights * (scale[..., None] * steps - parts) ** 2).sum(-1)
        better = error < best
        best, scales = np.where(better, error, best), np.where(better, scale, scales)
    return scales.astype(np.float32)


def _share(scales: Floats, largest: int) -> tuple[Floats, Floats]:
    """Return a scale of half precision for a block, and the whole numbers that its parts' scales are in it."""
    shared = (np.abs(scales).max(-1) / largest).astype(np.float16).astype(np.float32)
    whole = np.clip(np.rint(_divide(scales, shared[:, None])), -largest if (scales < 0).any() else 0, largest)
    return shared, whole.astype(np.float32)


def _divide(value: Floats | float, by: Floats) -> Floats:
    """Divide; by zero gives zero."""
    safe = np.where(by == 0, 1, by)
    quotient: Floats = np.where(by == 0, 0, np.asarray(value) / safe).astype(np.float32)
    return quotient


def _half(scale: Floats) -> Bytes:
    return scale.astype(np.float16)[:, None].view(np.uint8)
