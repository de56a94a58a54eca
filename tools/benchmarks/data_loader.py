#!/usr/bin/env python3
"""Batches per second: megatron_7b's loader beside megatron-core's GPTDataset, on the same files in one run.

    tools/benchmarks/data_loader.py [--documents N] [--seq-length S]
    tools/benchmarks/data_loader.py --first-batch 1000000 1000000000 --folder /scratch

Both read the same corpus of random documents, in shuffled order, one thread each. GPTDataset is timed twice: by
`__getitem__` alone (which shares one mask and one position tensor among all samples), and with the stacking into
microbatches that a training step needs; ours always gives whole microbatches, ids checked against the vocabulary. The
rounds alternate and the best of each is compared, by the wall clock and by the processor time of all threads; the
latter is the fairer one on a busy machine.

--first-batch measures instead how long the first batch takes, and how much memory, in corpora of this many documents:
the .idx is real (20 bytes per document on the disk of --folder), the .bin a hole of the right length, so all ids are 0.
Each figure is that of a fresh process, with the .idx dropped from the page cache before (cold) and right after (warm).
"""

import argparse
import json
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_7b.config.schema import DataConfig
from megatron_7b.data import BatchLoader, IndexWriter, open_split
from megatron_7b.data._index import Blend

VOCAB_SIZE = 50_000
PIECE = 1 << 22
"""Documents whose index is written at once."""


def write_corpus(prefix: Path, num_documents: int, mean_length: int) -> int:
    """Random documents with lengths like a web corpus's (log-normal); returns the number of tokens."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(mean_length) - 0.5, 1.0, num_documents), 1, 100_000).astype(np.int64)
    writer = IndexWriter(str(prefix), 2)
    for begin in range(0, num_documents, 10_000):
        part = lengths[begin : begin + 10_000]
        writer.add_documents(rng.integers(0, VOCAB_SIZE, int(part.sum()), dtype=np.uint16), part)
    writer.finish()
    return int(lengths.sum())


def open_stock(prefix: Path, seq_length: int, num_samples: int, cache: Path) -> tuple[object, float]:
    """megatron-core's GPTDataset, and the seconds to build it."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer

    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=seq_length,
        blend=([str(prefix)], None),
        split="100,0,0",
        path_to_cache=str(cache),
        tokenizer=NullTokenizer(VOCAB_SIZE),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    started = time.perf_counter()
    train, _, _ = BlendedMegatronDatasetBuilder(GPTDataset, [num_samples, 0, 0], lambda: True, config).build()
    return train, time.perf_counter() - started


def time_reader(
    read: Callable[[int], None], tokens_per_call: int, begin: int, seconds: float
) -> tuple[float, float, int]:
    """Call `read` with `begin`, `begin + 1`, … for some time: tokens per second, per processor second, next number."""
    started, processor_started = time.perf_counter(), time.process_time()
    number = begin
    while (elapsed := time.perf_counter() - started) < seconds:
        for _ in range(16):
            read(number)
            number += 1
    tokens = (number - begin) * tokens_per_call
    return tokens / elapsed, tokens / (time.process_time() - processor_started), number


def time_blend(num_sets: int, num_samples: int) -> dict[str, float]:
    """Processor seconds to find one's place far down a blend, and to go on from there."""
    weights = np.random.default_rng(0).integers(1, 1000, num_sets).tolist()
    started = time.process_time()
    blend = Blend(weights)
    blend.picks(10**9, 1)
    placed = time.process_time()
    blend.picks(10**9, num_samples)
    return {
        "first_pick_at_1e9_ms": (placed - started) * 1e3,
        "picks_per_second": num_samples / (time.process_time() - placed),
    }


def write_hollow_corpus(prefix: Path, num_documents: int) -> int:
    """An .idx of documents of 1 to 999 tokens and a .bin without content; returns the number of tokens."""

    def pieces() -> Iterator[np.ndarray]:
        for begin in range(0, num_documents, PIECE):
            rng = np.random.default_rng(begin)
            yield rng.integers(1, 1000, min(PIECE, num_documents - begin), dtype=np.int32)

    idx = prefix.with_suffix(".idx")
    num_tokens = 0
    with idx.open("wb") as file:

        def write(array: np.ndarray) -> None:
            file.write(array.tobytes())
            if file.tell() % 2**28 < array.nbytes:  # The page cache is not ours alone.
                drop_from_cache(file)

        file.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, num_documents, num_documents + 1))
        for lengths in pieces():
            write(lengths)
        for lengths in pieces():
            ends = num_tokens + np.cumsum(lengths, dtype=np.int64)
            write(2 * (ends - lengths))
            num_tokens = int(ends[-1])
        for begin in range(0, num_documents + 1, PIECE):
            write(np.arange(begin, min(begin + PIECE, num_documents + 1)))
    with prefix.with_suffix(".bin").open("wb") as file:
        file.truncate(2 * num_tokens)
    return num_tokens


def drop_from_cache(file: BinaryIO) -> None:
    """Write a file's pages back and forget them."""
    file.flush()
    os.fsync(file.fileno())
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


FIRST_BATCH = """
import sys, time
from megatron_7b.config.schema import DataConfig
from megatron_7b.data import open_split
prefix, index, packed = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "documents"
started = time.perf_counter()
config = DataConfig(train=(prefix,), split="99,1", seq_length=4096, reset_attention_mask=packed)
batch = open_split(config, "train", seed=1, vocab_size=50000).batch(range(index, index + 4))
seconds = time.perf_counter() - started
status = dict(line.split(":") for line in open("/proc/self/status"))
print(seconds, int(status["VmHWM"].split()[0]) / 1024)
"""


def time_first_batch(prefix: Path, index: int, kind: str, *, cold: bool) -> tuple[float, float]:
    """Seconds from opening the corpus to a microbatch of 4 x 4,096, and peak MiB of the process, imports included."""
    if cold:
        with prefix.with_suffix(".idx").open("rb+") as file:
            drop_from_cache(file)
    command = [sys.executable, "-c", FIRST_BATCH, str(prefix), str(index), kind]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    seconds, memory = map(float, output.split())
    return seconds, memory


def measure_first_batches(counts: list[int], folder: str | None) -> None:
    """Print a table row per corpus, epoch and kind of batch."""
    print("| documents | tokens | .idx | read | epoch | cold, ms | warm, ms | peak memory, MiB |")
    print("|---|---|---|---|---|---|---|---|")
    for count in counts:
        with tempfile.TemporaryDirectory(dir=folder) as work:
            prefix = Path(work) / "hollow"
            num_tokens = write_hollow_corpus(prefix, count)
            size = prefix.with_suffix(".idx").stat().st_size
            for epoch in (0, 1000):
                index = epoch * num_tokens // 4096 + 12345
                for kind in ("stream", "documents"):
                    cold, _ = time_first_batch(prefix, index, kind, cold=True)
                    warm = sorted(time_first_batch(prefix, index, kind, cold=False) for _ in range(5))
                    print(
                        f"| {count:,} | {num_tokens:.3g} | {size / 1e9:.2f} GB | {kind} | {epoch} | {cold * 1e3:.1f} | "
                        f"{warm[2][0] * 1e3:.1f} | {max(memory for _, memory in warm):.0f} |",
                        flush=True,
                    )


def main() -> None:
    """Print one line per measurement, then everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=200_000)
    parser.add_argument("--mean-length", type=int, default=500)
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="per round and reader")
    parser.add_argument("--first-batch", type=int, nargs="+", metavar="N", help="documents of the corpora to simulate")
    parser.add_argument("--folder", help="where --first-batch writes; the default is that of temporary files")
    arguments = parser.parse_args()
    if arguments.first_batch:
        measure_first_batches(arguments.first_batch, arguments.folder)
        return
    s, b = arguments.seq_length, arguments.micro_batch_size
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "corpus"
        num_tokens = write_corpus(prefix, arguments.documents, arguments.mean_length)

        started = time.perf_counter()
        dataset = open_split(
            DataConfig(train=(str(prefix),), split="1", seq_length=s), "train", seed=1, vocab_size=VOCAB_SIZE
        )
        dataset.batch(range(b))
        first_batch = time.perf_counter() - started
        own_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

        import torch

        torch.set_num_threads(1)
        stock, stock_build = open_stock(prefix, s, 2 * num_tokens // s, Path(folder) / "cache")
        size = len(stock)  # type: ignore[arg-type]
        inline = BatchLoader(dataset, micro_batch_size=b, num_workers=0)
        threaded = BatchLoader(dataset, micro_batch_size=b, num_workers=1)

        def item(number: int) -> None:
            stock[number % size]  # type: ignore[index]

        def stacked(number: int) -> None:
            samples = [stock[(number * b + i) % size] for i in range(b)]  # type: ignore[index]
            for key in ("tokens", "labels", "loss_mask", "position_ids"):
                torch.stack([sample[key] for sample in samples])

        def in_line(**options: object) -> Callable[[int], None]:
            config = DataConfig(train=(str(prefix),), split="1", seq_length=s, **options)  # type: ignore[arg-type]
            ids = (VOCAB_SIZE - 3, VOCAB_SIZE - 2, VOCAB_SIZE - 1)
            reader = open_split(config, "train", seed=1, vocab_size=VOCAB_SIZE, fim_ids=ids)
            return lambda number: void(reader.batch(range(number * b, number * b + b)))

        readers: dict[str, tuple[Callable[[int], None], int]] = {
            "GPTDataset.__getitem__": (item, s),
            "GPTDataset, stacked microbatches": (stacked, s * b),
            "BatchLoader, in line": (lambda number: void(inline.batches(number * b, b)), s * b),
            "… documents kept apart": (in_line(reset_attention_mask=True, reset_position_ids=True), s * b),
            "… fill-in-the-middle, all": (in_line(fim_rate=1.0), s * b),
            "BatchLoader, one thread ahead": (lambda number: void(threaded.batches(number * b, b)), s * b),
        }
        wall = dict.fromkeys(readers, 0.0)
        processor = dict.fromkeys(readers, 0.0)
        position = dict.fromkeys(readers, 0)
        for _ in range(arguments.rounds):
            for name, (read, tokens) in readers.items():
                rate, per_processor, position[name] = time_reader(read, tokens, position[name], arguments.seconds)
                wall[name] = max(wall[name], rate)
                processor[name] = max(processor[name], per_processor)
        threaded.close()

    print(f"{arguments.documents:,} documents, {num_tokens:,} tokens, s {s}, microbatches of {b}")
    print(f"time to the first batch: ours {first_batch * 1e3:.1f} ms, GPTDataset's index {stock_build * 1e3:.0f} ms")
    print(f"resident after our first batch: {own_memory:.0f} MiB")
    reference = "GPTDataset.__getitem__"
    print(f"{'M tokens per second':<34}{'wall clock':>18}{'processor':>20}")
    for name in readers:
        columns = [f"{rates[name] / 1e6:10.1f} {rates[name] / rates[reference]:6.1f}x" for rates in (wall, processor)]
        print(f"{name:<34}" + "  ".join(columns))
    blend = time_blend(5000, 1_000_000)
    print(
        f"blend of 5,000 sets: sample 10^9 found in {blend['first_pick_at_1e9_ms']:.1f} ms, "
        f"then {blend['picks_per_second'] / 1e6:.2f} M samples/s"
    )
    measured = {"tokens_per_second": wall, "tokens_per_processor_second": processor}
    print(json.dumps({**measured, "first_batch_seconds": first_batch, **blend}))


def void(value: object) -> None:
    """Drop a value: what is timed is the making of it, and that its buffer can be used again."""
    del value


if __name__ == "__main__":
    main()
