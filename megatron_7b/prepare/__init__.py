"""From raw files to clean text: what comes before tokenizing.

Raw JSONL, parquet, plain text, html and WARC go in; shards of clean, deduplicated, split JSONL come out, with an
account of every removed document. Imports no torch. Code that needs an optional library names the extra that brings it.
"""

from megatron_7b.prepare.preparing import prepare_files

__all__ = ["prepare_files"]
