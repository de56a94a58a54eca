"""A share of some files, evenly spread over all of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_7b.data.reading.records import ParsedBlock, parse_block
from megatron_7b.data.reading.sources import Source
from megatron_7b.errors import ConfigError

_BLOCK_BYTES = 1 << 20
_SMALLEST_BLOCK_BYTES = 1 << 14
_BLOCKS_OF_SMALL_INPUT = 64


@dataclass(frozen=True)
class SpreadReader:
    """Reads evenly spread blocks of files.

    Attributes:
        sources: The files.
        sample_mb: How much of them to read [MB]; None reads all.
    """

    sources: Sequence[Source]
    sample_mb: float | None = None

    def __post_init__(self) -> None:
        """Check the size of the sample.

        Raises:
            ConfigError: It is not positive.
        """
        if self.sample_mb is not None and not self.sample_mb > 0:
            raise ConfigError(f"--sample-mb is {self.sample_mb:g}, expected more than 0")

    @property
    def total_bytes(self) -> int:
        """Size of the files."""
        return sum(source.size for source in self.sources)

    @property
    def bytes_read(self) -> int:
        """How far reading has come."""
        return sum(source.bytes_read for source in self.sources)

    def read_blocks(self, keys: Sequence[str]) -> Iterator[tuple[Source, ParsedBlock]]:
        """Yield each block of the sample with the file that it is from.

        Raises:
            DataFormatError: A file is damaged as a whole.
        """
        total = max(1, self.total_bytes)
        share = 1.0 if self.sample_mb is None else min(1.0, self.sample_mb * 1e6 / total)
        # Small inputs in small blocks, so that a sample is spread there too.
        block_bytes = min(_BLOCK_BYTES, max(_SMALLEST_BLOCK_BYTES, total // _BLOCKS_OF_SMALL_INPUT))
        owed = 1.0 - share
        for source in self.sources:
            for block in source.read_blocks(keys, "file", block_bytes):
                owed += share
                if owed >= 1.0:
                    owed -= 1.0
                    yield source, parse_block(block, keys)
