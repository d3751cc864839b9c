// How kernels are launched. nvcc compiles them for the GPU; any C++ compiler compiles the same sources
// for the CPU against the emulation of tests/cuda_emulation, which supplies the names CUDA builds in.
#pragma once

#if defined(__CUDACC__)
#define AEFAST_LAUNCH(kernel, blocks, threads, stream, ...) (kernel)<<<(blocks), (threads), 0, (stream)>>>(__VA_ARGS__)
#else
#include "cuda_emulation.h"
#define AEFAST_LAUNCH(kernel, blocks, threads, stream, ...) \
  aefast::emulation::launch((blocks), (threads), [=] { (kernel)(__VA_ARGS__); })
#endif
