"""Initial weights that depend on the seed and the parameter's name only: the same model at every layout.

Each parameter is drawn in blocks of rows of the whole tensor, each block from its own generator. A rank draws the
blocks that its shard touches and keeps its part, so no rank needs the whole model, and a different padding of the
vocabulary changes nothing.
"""

import hashlib
import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from megatron_7b.config.schema import ModelConfig
from megatron_7b.model.parameters import Parameter

_BLOCK_ELEMENTS = 1 << 20
_FILLED_AT_ONCE = 16
"""torch fills a tensor by sixteens, in order, and the last of them again where they do not come out even: whole
sixteens that leave as many to follow are the beginning of any longer tensor from the same generator."""


def _generator(seed: int, name: str, block: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}:{name}:{block}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def draw_rows(
    name: str,
    row_width: int,
    first: int,
    last: int,
    *,
    seed: int,
    std: float,
    is_uniform: bool = False,
    columns: slice = slice(None),
    out: Tensor | None = None,
) -> Tensor:
    """Fill rows [first, last) of a randomly filled parameter, block by block, each drawn in FP32 on the CPU.

    Blocks go straight to where they belong, on all cores: a large parameter is in memory once.

    Args:
        name: What the values are a function of, beside the seed.
        row_width: Elements of one row of the whole parameter.
        first: First row.
        last: One past the last row.
        seed: Seed of the run.
        std: Standard deviation.
        is_uniform: The values are evenly distributed around zero; otherwise normally.
        columns: Which elements of the rows to keep.
        out: [last - first, kept columns], of any type and device; None: a new one in FP32 on the CPU.

    Returns:
        `out`.
    """
    if out is None:
        out = torch.empty(last - first, len(range(row_width)[columns]))
    rows_per_block = max(1, _BLOCK_ELEMENTS // row_width)
    size = rows_per_block * row_width
    blocks = range(first // rows_per_block, math.ceil(last / rows_per_block))
    thread = threading.local()

    def draw(block: int) -> None:
        start = block * rows_per_block
        low, high = max(first, start), min(last, start + rows_per_block)
        needed = (high - start) * row_width
        beginning = math.ceil(needed / _FILLED_AT_ONCE) * _FILLED_AT_ONCE
        if not hasattr(thread, "values"):  # memory that is new costs more than the numbers in it
            thread.values = torch.empty(size)
        values = thread.values[: beginning if beginning + _FILLED_AT_ONCE <= size else size]
        generator = _generator(seed, name, block)
        if is_uniform:
            values.uniform_(-std * math.sqrt(3.0), std * math.sqrt(3.0), generator=generator)
        else:
            values.normal_(0.0, std, generator=generator)
        rows = values[:needed].view(-1, row_width)[low - start :, columns]
        with torch.no_grad():  # a pool's threads do not inherit it
            out[low - first : high - first].copy_(rows)

    if len(blocks) == 1:
        draw(blocks[0])
    else:
        with ThreadPoolExecutor() as pool:
            list(pool.map(draw, blocks))
    return out


def shard_ranges(parameter: Parameter, tp_rank: int, tp_size: int) -> Iterator[tuple[int, int]]:
    """Yield the row ranges of the whole parameter that a tensor rank's shard consists of, in order."""
    rows = parameter.shape[0]
    if parameter.tp_dim != 0 or tp_size == 1:
        yield 0, rows
    elif parameter.arrangement == "gate_up":
        part = rows // 2 // tp_size
        for half in (0, rows // 2):
            yield half + tp_rank * part, half + (tp_rank + 1) * part
    else:
        part = rows // tp_size
        yield tp_rank * part, (tp_rank + 1) * part


def initial_shard(
    parameter: Parameter, *, model: ModelConfig, seed: int, tp_rank: int, tp_size: int, vocab_size: int
) -> Tensor:
    """Return one tensor rank's part of a freshly initialised parameter, in FP32 on the CPU.

    Args:
        parameter: The whole, vocabulary padding included.
        model: Shape of the model.
        seed: Seed of the run.
        tp_rank: Rank within the tensor-parallel group.
        tp_size: Size of that group.
        vocab_size: True vocabulary size; padded rows are zero.
    """
    shape = [size // tp_size if dim == parameter.tp_dim else size for dim, size in enumerate(parameter.shape)]
    shard = torch.empty(shape)
    fill_shard(shard, parameter, model=model, seed=seed, tp_rank=tp_rank, tp_size=tp_size, vocab_size=vocab_size)
    return shard


def fill_shard(
    shard: Tensor, parameter: Parameter, *, model: ModelConfig, seed: int, tp_rank: int, tp_size: int, vocab_size: int
) -> None:
    """Write `initial_shard` into a tensor of its shape, of any type and device, without another one of that size."""
    if parameter.init in ("ones", "zeros"):
        shard.fill_(1.0 if parameter.init == "ones" else 0.0)
        return
    if parameter.query_scale != 1.0 and shard.dtype != torch.float32:  # scaled before it is rounded
        whole = torch.empty_like(shard, dtype=torch.float32)
        fill_shard(whole, parameter, model=model, seed=seed, tp_rank=tp_rank, tp_size=tp_size, vocab_size=vocab_size)
        shard.copy_(whole)
        return
    # Source: GPT-2 and Megatron: projections into the residual stream are narrowed by the number of additions to it.
    std = model.init_method_std if parameter.std is None else parameter.std
    std /= math.sqrt(2.0 * model.num_layers) if parameter.init == "scaled_normal" else 1.0
    width, columns = parameter.shape[1], slice(None)
    if parameter.tp_dim == 1:
        columns = slice(tp_rank * (width // tp_size), (tp_rank + 1) * (width // tp_size))
    filled = 0
    for first, last in shard_ranges(parameter, tp_rank, tp_size):
        rows = shard[filled : filled + last - first]
        true_last = max(first, min(last, vocab_size)) if parameter.is_padded else last
        draw_rows(
            parameter.core_name,
            width,
            first,
            true_last,
            seed=seed,
            std=std,
            is_uniform=parameter.init == "uniform",
            columns=columns,
            out=rows[: true_last - first],
        )
        rows[true_last - first :] = 0.0
        filled += last - first
    if parameter.query_scale != 1.0:
        queries = model.num_attention_heads // model.query_groups * model.head_width
        shard.view(-1, queries + 2 * model.head_width, width)[:, :queries] *= parameter.query_scale
