"""Raw text to `.bin/.idx`: readers, the pipeline over all cores, and the manifest.

Tokenizers are handed in by the caller: this package knows nothing of them but `pipeline.BatchEncoder`.
"""
