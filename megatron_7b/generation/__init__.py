"""Text from a model: sampling, a key-value cache, and an engine that streams tokens at any TP×PP."""
