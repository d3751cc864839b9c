// The updates of optimizers, compiled once per instruction set and chosen at run time.
#pragma once

#include <cstdint>

#include "scalar.h"

namespace aefast::cpu {

// Of Adam, at one step of a parameter p with gradient g, mean m of gradients and mean v of their squares:
//   g = scale g, written where scale is not 1
//   g' = sign g + decay p, without the second term where decay is 0
//   m = mean_decay m + mean_weight g',  v = square_decay v + square_weight g'^2
//   p = kept p - rate m / (root sqrt(v) + epsilon)
//   a = a + average_weight (p - a), where there is a moving average of the parameter
struct AdamFactors {
  double scale, sign, decay, mean_decay, mean_weight, square_decay, square_weight, kept, rate, root, epsilon;
  double average_weight;
};

struct OptimizerKernels {
  // `count` elements, in float32 or float64; `average` may be null. What becomes of one depends on nothing but itself.
  void (*adam)(Scalar scalar, const AdamFactors& factors, void* parameter, void* gradient, void* mean, void* square,
               void* average, int64_t count);
  // Of `count` elements, in float32 or float64.
  double (*sum_of_squares)(Scalar scalar, const void* values, int64_t count);
};

const OptimizerKernels& optimizer_kernels();

}  // namespace aefast::cpu
