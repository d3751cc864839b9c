// The pointwise passes of the dense layers, compiled once per instruction set and chosen at run time.
#pragma once

#include <cstdint>

#include "activation.h"
#include "scalar.h"

namespace aefast::cpu {

// All matrices are row-major with `cols` elements a row; the rows of `grad` alone may lie apart.
struct PointwiseKernels {
  // out = act(pre + bias), derivative = act'(pre + bias). `bias` (cols,) of out's type or null;
  // `derivative` null unless stores_derivative(activation). `pre` may be `out` itself.
  void (*bias_activation)(ActivationSpec spec, Scalar pre_type, Scalar out_type, const void* pre, const void* bias,
                          void* out, void* derivative, int64_t rows, int64_t cols);

  // g = grad * act' with act' from `saved` (the derivative or the output; ignored for identity);
  // column_sums (cols,) in the accumulator type of g_type = sum of g over the rows. Either of g and
  // column_sums may be null. `grad` may be `g` itself. saved is of g_type, grad of g_type or its accumulator.
  void (*activation_gradient)(ActivationSpec spec, Scalar grad_type, Scalar g_type, const void* grad,
                              int64_t grad_row_stride, const void* saved, void* g, void* column_sums, int64_t rows,
                              int64_t cols);

  // out (rows, cols) row-major = in, of any strides.
  void (*convert)(Scalar in_type, Scalar out_type, const void* in, int64_t row_stride, int64_t col_stride, void* out,
                  int64_t rows, int64_t cols);

  // out (cols,) = sum over rows of partials (rows, cols), in row order and in
  // double; partials in out's accumulator type.
  void (*sum_rows)(Scalar out_type, const void* partials, void* out, int64_t rows, int64_t cols);

  const char* instruction_set;
};

const PointwiseKernels& pointwise();

}  // namespace aefast::cpu
