"""Raw text to `.bin/.idx`: readers, the pipeline over all cores, and the manifest.

The caller passes the encoder, of which this package knows only the protocol `encoding.BatchEncoder`.
"""
