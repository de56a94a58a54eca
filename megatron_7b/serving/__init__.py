"""Checkpoints behind an HTTP interface: one engine, many clients."""
