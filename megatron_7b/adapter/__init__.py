"""Adapters: few parameters that learn beside a model of any kind, while the model stays as it is.

What a method adds is a table of rows, as a model's own parameters are, so that initial values, sharding, checkpoints
and conversion follow from it. `building` knows the methods; importing this package imports no torch.
"""

from megatron_7b.adapter.building import build_adapter

__all__ = ["build_adapter"]
