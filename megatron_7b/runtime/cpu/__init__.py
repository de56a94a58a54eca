"""What stands in for CUDA on a CPU: the backend, fused kernels, vector mathematics, the allocator."""
