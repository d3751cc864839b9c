// The passes that make noise, and the divergences that go with them, compiled once per instruction set and chosen at
// run time.
#pragma once

#include <cstdint>

#include "scalar.h"

namespace aefast::cpu {

// Normal distributions, one a row. Rows may lie apart, strides being in elements; their elements are side by side.
struct Moments {
  const void* mu;
  const void* logvar;
  int64_t mu_stride, logvar_stride;
  int64_t cols;
  double low, high;  // logvar counts as its nearest value between them
};

struct SampleGradient {
  const void* grad_z;  // or null
  int64_t grad_z_stride;
  const void* grad_kl;  // one a row, accumulators; or null
  int64_t grad_kl_stride;
  void* mu;
  void* logvar;
  int64_t stride;  // of both
};

enum class NoiseKind { gaussian, salt_and_pepper, masking, dropout };

// As in Noise of aefast/ops/corrupt.py. `last` is limit - 1.
struct Noise {
  NoiseKind kind;
  double first, second;
  uint32_t last, half;
};

// (N, C, H, W), and the side of the squares that are masked at once.
struct Images {
  int64_t channels, height, width;
  int64_t block;
};

// Elements are those of `scalar`, sums and divergences of its accumulator. Ranges are [first, first + count).
struct RandomKernels {
  // Normal values, or words, of elements from `first` on, one after another.
  void (*normals)(uint64_t seed, int64_t first, int64_t count, float* out);
  void (*words)(uint64_t seed, int64_t first, int64_t count, uint32_t* out);

  // z (rows, cols) row-major, or null; kl, one a row.
  void (*sample)(Scalar scalar, const Moments& moments, uint64_t seed, void* z, void* kl, int64_t first, int64_t count);

  void (*sample_gradient)(Scalar scalar, const Moments& moments, uint64_t seed, const SampleGradient& gradient,
                          int64_t first, int64_t count);

  // Elements of x and out; `first` is a multiple of 4.
  void (*corrupt)(Scalar scalar, const Noise& noise, uint64_t seed, const void* x, void* out, int64_t first,
                  int64_t count);

  // Images of x and out, contiguous.
  void (*mask_squares)(Scalar scalar, const Noise& noise, uint64_t seed, const Images& images, const void* x, void* out,
                       int64_t first, int64_t count);

  // kl, one a row, of p and q, whose rows may lie apart.
  void (*divergence)(Scalar scalar, const void* p, int64_t p_stride, const void* q, int64_t q_stride, void* kl,
                     int64_t cols, int64_t first, int64_t count);

  // p_gradient and q_gradient row-major; grad as SampleGradient's grad_kl.
  void (*divergence_gradient)(Scalar scalar, const void* grad, int64_t grad_stride, const void* p, int64_t p_stride,
                              const void* q, int64_t q_stride, void* p_gradient, void* q_gradient, int64_t cols,
                              int64_t first, int64_t count);
};

const RandomKernels& random_kernels();

}  // namespace aefast::cpu
