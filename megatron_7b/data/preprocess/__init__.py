"""Raw text to `.bin/.idx`: readers, the pipeline over all cores, and the manifest.

Encoders are handed in by the caller: of them this package knows `encoding.BatchEncoder` only.
"""
