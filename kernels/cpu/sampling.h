// Samples and divergences of normal distributions.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "matrix.h"
#include "parallel.h"
#include "random.h"

namespace aefast::cpu {

// With its elements side by side within a row.
inline Tensor with_unit_columns(const Tensor& matrix) {
  return matrix.size(1) <= 1 || matrix.stride(1) == 1 ? matrix : torch::stable::contiguous(matrix);
}

inline uint64_t seed_of(const Tensor& seed) {
  check_seed(seed);
  return static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr()));
}

// That `grad` has a value for each of `rows`, in the type that `like` is summed in.
inline void check_row_values(const char* name, const Tensor& grad, int64_t rows, const Tensor& like) {
  STD_TORCH_CHECK(grad.dim() == 1 && grad.size(0) == rows && scalar_of(grad) == accumulator_of(scalar_of(like)), name,
                  " must be (", rows, ",) of the dtype of the divergence");
}

inline Moments moments_of(const Tensor& mu, const Tensor& logvar, double low, double high) {
  STD_TORCH_CHECK(mu.dim() == 2, "mu must be a matrix");
  check_matrix("logvar", logvar, mu.size(0), mu.size(1), mu);
  return {mu.const_data_ptr(), logvar.const_data_ptr(), mu.stride(0), logvar.stride(0), mu.size(1), low, high};
}

// z, if it is given, and kl of all rows.
inline void sample(Scalar scalar, int64_t rows, const Moments& moments, uint64_t seed, void* z, const Tensor& kl) {
  for_tasks(rows, moments.cols, 1, [&](int64_t first, int64_t count) {
    random_kernels().sample(scalar, moments, seed, z, kl.mutable_data_ptr(), first, count);
  });
}

inline void sample_gradient(Scalar scalar, int64_t rows, const Moments& moments, uint64_t seed,
                            const SampleGradient& gradient) {
  for_tasks(rows, moments.cols, 1, [&](int64_t first, int64_t count) {
    random_kernels().sample_gradient(scalar, moments, seed, gradient, first, count);
  });
}

}  // namespace aefast::cpu
