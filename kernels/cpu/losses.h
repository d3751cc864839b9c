// The passes of losses over pairs of tensors, compiled once per instruction set and chosen at run time.
#pragma once

#include <cstdint>

#include "loss.h"
#include "scalar.h"

namespace aefast::cpu {

// Two operands of `scalar`, whose elements lie side by side and in the same order.
struct LossOperands {
  Scalar scalar;
  loss::Spec spec;
  const void* input;
  const void* target;
};

struct LossSum {
  double value;
  bool is_outside;  // whether one of the numbers that bce's are to have from 0 to 1 is outside
};

// Raises an error for a kind that is unknown.
loss::Spec spec_of(const char* kind, double parameter);

// Raises an error if the numbers are `checked` and one is outside.
void check_range(const LossSum& sum, bool checked);

// The sum, in order.
LossSum sum_of(const LossSum* parts, int64_t count);

// Ranges of elements are [first, first + count).
struct LossKernels {
  // The sum of the losses; `gradient`, unless it is null, = scale * derivative by the input.
  LossSum (*sum)(const LossOperands& operands, double scale, void* gradient, int64_t first, int64_t count);

  // out, of accumulators, = the losses.
  LossSum (*elements)(const LossOperands& operands, void* out, int64_t first, int64_t count);

  // gradient = factor * grad * derivative by the input; grad of accumulators, or null for 1.
  void (*elements_gradient)(const LossOperands& operands, double factor, const void* grad, void* gradient,
                            int64_t first, int64_t count);

  // out = factor * in, both of `scalar`.
  void (*scaled)(Scalar scalar, double factor, const void* in, void* out, int64_t first, int64_t count);
};

const LossKernels& loss_kernels();

}  // namespace aefast::cpu
