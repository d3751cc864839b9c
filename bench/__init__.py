"""The benchmark: aefast beside plain PyTorch, interleaved in one process."""
