"""Queries and the texts that answer them: what embeddings are learned from."""
