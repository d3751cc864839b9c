// Kernels that show what the emulation's barriers and shuffles do; driven by test_emulation.py.
#include <cstddef>
#include <string>

#include "launch.h"

namespace {

__global__ void reverse_block(const int* in, int* out, bool with_barrier) {
  __shared__ int shared[256];
  shared[threadIdx.x] = in[threadIdx.x];
  if (with_barrier) __syncthreads();
  out[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

__global__ void shuffle_up_and_down(int* out) {
  const unsigned mask = blockDim.x % 32 == 0 ? 0xffffffffu : (1u << blockDim.x % 32) - 1;
  const int lane = threadIdx.x % 32;
  const int up = __shfl_up_sync(mask, lane, 1), down = __shfl_down_sync(mask, lane, 1);
  out[threadIdx.x] = 100 * up + down;
}

__global__ void half_the_block_waits() {
  if (threadIdx.x < 64) __syncthreads();
  __syncwarp();
  if (threadIdx.x >= 64) return;
  __syncthreads();
}

__global__ void half_a_warp_waits() {
  if (threadIdx.x < 16) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

}  // namespace

extern "C" const char* run(const char* name, unsigned long seed, int threads, const int* in, int* out) {
  static std::string text;
  aefast::emulation::machine.seed(seed);
  const std::string kernel = name;
  try {
    if (kernel == "reverse") AEFAST_LAUNCH(reverse_block, 1, threads, nullptr, in, out, true);
    if (kernel == "reverse without barrier") AEFAST_LAUNCH(reverse_block, 1, threads, nullptr, in, out, false);
    if (kernel == "shuffles") AEFAST_LAUNCH(shuffle_up_and_down, 1, threads, nullptr, out);
    if (kernel == "half the block") AEFAST_LAUNCH(half_the_block_waits, 1, threads, nullptr);
    if (kernel == "half a warp") AEFAST_LAUNCH(half_a_warp_waits, 1, threads, nullptr);
  } catch (const std::exception& error) {
    text = error.what();
    return text.c_str();
  }
  return nullptr;
}
