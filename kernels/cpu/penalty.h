// The passes of sparse activations and of their penalties, compiled once per instruction set and chosen at run time.
#pragma once

#include <cstdint>

#include "scalar.h"

namespace aefast::cpu {

// x (rows, cols), whose rows may lie apart, and the threshold (cols,), accumulators, of each column.
struct JumpOperands {
  Scalar scalar;
  const void* x;
  int64_t x_stride;
  const void* threshold;
  int64_t cols;
};

// Each of the incoming gradients may be null, and so may what is computed of them.
struct JumpGradient {
  const void* grad_h;  // rows may lie apart
  int64_t grad_h_stride;
  const void* grad_l0;  // one a row, accumulators
  int64_t grad_l0_stride;
  void* x;               // of the operands' scalar, row-major
  void* threshold_sums;  // (cols,), accumulators
  double bandwidth;
};

// Elements are those of `scalar`. Matrices are row-major, unless their rows may lie apart.
struct PenaltyKernels {
  // sums (cols,), accumulators, = the sums of h's columns, or with of_magnitudes of |h|'s; or += with `add`.
  void (*column_sums)(Scalar scalar, bool of_magnitudes, const void* h, void* sums, int64_t rows, int64_t cols,
                      bool add);

  // out = upstream + slopes * sign(h), or upstream + slopes where h is null. `upstream`, whose rows may lie apart, null
  // for 0; slopes (cols,) and out (rows, cols) are accumulators.
  void (*add_slopes)(Scalar scalar, const void* upstream, int64_t upstream_stride, const void* slopes, const void* h,
                     void* out, int64_t rows, int64_t cols);

  // h = x where it is above its threshold, else 0; l0, accumulators, = how many of a row are. Rows [first, first + count).
  void (*jump)(const JumpOperands& operands, void* h, void* l0, int64_t first, int64_t count);

  // x's gradient, and in threshold_sums the sum of the threshold's, of rows [first, first + count) and columns
  // [begin, begin + width).
  void (*jump_gradient)(const JumpOperands& operands, const JumpGradient& gradient, int64_t first, int64_t count,
                        int64_t begin, int64_t width);
};

const PenaltyKernels& penalty_kernels();

}  // namespace aefast::cpu
