"""From raw files to clean text: what comes before tokenizing.

Raw JSONL, parquet, plain text, html and WARC go in; shards of clean, deduplicated, split JSONL come out, and an account
of every document that did not. Imports no torch. What needs a library that is not always installed names the extra that
brings it.
"""
