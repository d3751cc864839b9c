#include <torch/csrc/stable/library.h>

#include <tuple>

#include "jumprelu_schemas.h"
#include "matrix.h"
#include "parallel.h"
#include "penalty.h"
#include "pointwise.h"
#include "sampling.h"

namespace aefast::cpu {
namespace {

JumpOperands operands_of(const Tensor& x, const Tensor& threshold) {
  STD_TORCH_CHECK(x.dim() == 2, "x must be a matrix");
  STD_TORCH_CHECK(threshold.dim() == 1 && threshold.size(0) == x.size(1) &&
                      scalar_of(threshold) == accumulator_of(scalar_of(x)),
                  "threshold must be (", x.size(1), ",) of the type that x is summed in");
  return {scalar_of(x), x.const_data_ptr(), x.stride(0), threshold.const_data_ptr(), x.size(1)};
}

Tensor with_unit_stride(const Tensor& vector) {
  return vector.size(0) <= 1 || vector.stride(0) == 1 ? vector : torch::stable::contiguous(vector);
}

std::tuple<Tensor, Tensor> jumprelu(Tensor x, Tensor threshold) {
  STD_TORCH_CHECK(x.dim() == 2 && threshold.dim() == 1, "x must be a matrix, and threshold a vector");
  x = with_unit_columns(x);
  threshold = with_unit_stride(threshold);
  const JumpOperands operands = operands_of(x, threshold);
  const Tensor h = new_matrix(x, x.size(0), x.size(1)), l0 = new_sums(x, x.size(0));
  for_tasks(x.size(0), x.size(1), 1, [&](int64_t first, int64_t count) {
    penalty_kernels().jump(operands, h.mutable_data_ptr(), l0.mutable_data_ptr(), first, count);
  });
  return {h, l0};
}

std::tuple<OptionalTensor, OptionalTensor> jumprelu_backward(OptionalTensor grad_h, OptionalTensor grad_l0, Tensor x,
                                                             Tensor threshold, double bandwidth, int64_t needs) {
  STD_TORCH_CHECK(grad_h || grad_l0, "one of grad_h and grad_l0 must be given");
  STD_TORCH_CHECK(x.dim() == 2 && threshold.dim() == 1, "x must be a matrix, and threshold a vector");
  x = with_unit_columns(x);
  threshold = with_unit_stride(threshold);
  const JumpOperands operands = operands_of(x, threshold);
  const int64_t rows = x.size(0), cols = x.size(1);
  JumpGradient gradient{};
  gradient.bandwidth = bandwidth;
  if (grad_h) {
    check_matrix("grad_h", *grad_h, rows, cols, x);
    grad_h = with_unit_columns(*grad_h);
    gradient.grad_h = grad_h->const_data_ptr();
    gradient.grad_h_stride = grad_h->stride(0);
  }
  if (grad_l0) {
    check_row_values("grad_l0", *grad_l0, rows, x);
    gradient.grad_l0 = grad_l0->const_data_ptr();
    gradient.grad_l0_stride = grad_l0->stride(0);
  }
  OptionalTensor x_gradient, threshold_gradient;
  if (needs & jump::kNeedX) {
    x_gradient = new_matrix(x, rows, cols);
    gradient.x = x_gradient->mutable_data_ptr();
  }
  // The threshold's gradient is summed over blocks of rows, and then over the blocks in order. Blocks and the strips of
  // columns in them, whose sums stay in the first-level cache, depend on the shape alone.
  constexpr int64_t kRows = 64, kStrip = 2048;
  const int64_t blocks = (rows + kRows - 1) / kRows, strips = (cols + kStrip - 1) / kStrip;
  OptionalTensor partials;
  if (needs & jump::kNeedThreshold) partials = new_accumulators(x, blocks, cols);
  for_tasks(blocks * strips, kRows * std::min(kStrip, cols), 1, [&](int64_t from, int64_t count) {
    for (int64_t task = from; task < from + count; ++task) {
      const int64_t block = task / strips, first = block * kRows, begin = task % strips * kStrip;
      JumpGradient part = gradient;
      if (partials) part.threshold_sums = matrix_of(partials).row_block(block, 1).data;
      penalty_kernels().jump_gradient(operands, part, first, std::min(kRows, rows - first), begin,
                                      std::min(kStrip, cols - begin));
    }
  });
  if (partials) {
    threshold_gradient = new_sums(x, cols);
    pointwise().sum_rows(accumulator_of(scalar_of(x)), partials->const_data_ptr(),
                         threshold_gradient->mutable_data_ptr(), blocks, cols);
  }
  return {x_gradient, threshold_gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(aefast_cpu, m) {
  for (const char* schema : jump::kJumpreluSchemas) m.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(aefast_cpu, CPU, m) {
  m.impl("jumprelu", TORCH_BOX(&jumprelu));
  m.impl("jumprelu_backward", TORCH_BOX(&jumprelu_backward));
}

}  // namespace aefast::cpu
