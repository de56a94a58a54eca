"""Checkpoints: sharded by megatron-core's dist_checkpointing, published only when complete, loadable at any layout.

A checkpoint is a folder `checkpoints/step_00000010/` with the sharded tensors under canonical names, `config.yaml`,
companions and `checkpoint.json`: counters, layout, and the hash of every file. Folders, companions and manifests need
no torch; `save`, `load` and `weights` do.
"""

from megatron_7b.checkpoint.companions import Companions, tokenizer_path
from megatron_7b.checkpoint.folders import latest_checkpoint, publish, resolve_checkpoint, step_folder
from megatron_7b.checkpoint.manifest import Counters, Manifest, read_config, read_manifest, verify_files

__all__ = [
    "Companions",
    "Counters",
    "Manifest",
    "latest_checkpoint",
    "publish",
    "read_config",
    "read_manifest",
    "resolve_checkpoint",
    "step_folder",
    "tokenizer_path",
    "verify_files",
]
