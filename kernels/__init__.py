"""Device code: CPU, CUDA and Triton kernels with their launchers. Knows nothing of ops or models."""
