"""Corpora that exist already: merged, verified, adopted."""
