"""What replaces CUDA on a CPU: the backend, fused kernels, vector mathematics, the allocator."""
