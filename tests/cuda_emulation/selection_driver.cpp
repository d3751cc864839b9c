// The kernel of selection_kernels.cuh for plain arrays of float32, with the order of threads that a seed gives.
#include "selection_kernels.cuh"

extern "C" void largest(const float* elements, float* values, int64_t* indices, int64_t rows, int columns, int k,
                        uint64_t machine_seed) {
  aefast::emulation::machine.seed(machine_seed);
  aefast::cuda::launch_largest(elements, values, indices, rows, columns, k, nullptr);
}
