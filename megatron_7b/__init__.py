"""megatron_7b: from raw text to a served 7B language model, on a laptop CPU and on a Slurm cluster of GPUs."""

__version__ = "0.1.0"
