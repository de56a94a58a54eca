"""Checkpoints: sharded as torch's distributed ones, published only when complete, loadable at any layout.

A checkpoint is a folder `checkpoints/step_00000010/` with the sharded tensors under canonical names, `config.yaml`,
companions and `checkpoint.json`: counters, layout, the hash of every file, and a checksum of itself. What is read has
a record there, and nothing that is read can run code. Folders, companions and manifests need no torch; `save`, `load`
and `weights` do.
"""

from megatron_7b.checkpoint.companions import Companions, tokenizer_path
from megatron_7b.checkpoint.folders import latest_checkpoint, resolve_checkpoint, step_folder
from megatron_7b.checkpoint.manifest import Counters, Manifest, config_file, read_config, read_manifest
from megatron_7b.checkpoint.publishing import publish
from megatron_7b.checkpoint.records import verify_files

__all__ = [
    "Companions",
    "Counters",
    "Manifest",
    "config_file",
    "latest_checkpoint",
    "publish",
    "read_config",
    "read_manifest",
    "resolve_checkpoint",
    "step_folder",
    "tokenizer_path",
    "verify_files",
]
