// Kernel functions of squared distances and their slopes, for a scalar and for vectors of floats alike. C is what they
// are computed in and A the type of its elements; C comes with exp2_nonpositive, log, reciprocal, reciprocal_root,
// is_zero and select.
#pragma once

#include <cstdint>

#include "elementary.h"

namespace aefast::pairwise {

enum class Kind { rbf, laplacian, imq, rational_quadratic, energy };

// Whether gradients Σ w (x - y) are to be summed as they are. Where slopes grow with 1 / distance, x Σ w - Σ w y would
// lose the digits of what close points do to each other.
constexpr bool sums_differences(Kind kind) { return kind == Kind::laplacian || kind == Kind::energy; }

// A sum of kernels of one kind. With u a squared distance, the k-th is exp2(-rate[k] u) for rbf and exp2(-rate[k] √u)
// for laplacian, 1 / (1 + rate[k] u) for imq and its alpha-th power for rational_quadratic, and -rate[0] √u for energy.
// A kernel of rbf may instead be the one before it, squared so many times: that is what squarings[k] says, 0 for none.
// weight[k] is such that the derivative by u, times a number of the caller's choice, is Σ weight[k] s_k with
// rbf s = value; laplacian s = value / √u; imq s = value²; rational_quadratic s = value^(1 + 1 / alpha); for energy it
// is weight[0] / √u.
template <typename A>
struct Function {
  int64_t count;
  const A* rate;
  const A* weight;
  const int32_t* squarings;
  A alpha;
};

// The value at u >= 0, and the slope as `weight` has it; where √u has no derivative, at 0, the slope is 0.
template <Kind kKind, typename C, typename A>
AEFAST_HD void evaluate(const Function<A>& function, C u, C& value, C& slope) {
  using elementary::exp2_nonpositive;
  using elementary::is_zero;
  using elementary::log;
  using elementary::reciprocal;
  using elementary::reciprocal_root;
  using elementary::select;
  if constexpr (kKind == Kind::rbf) {
    C power(A(0));
    value = slope = C(A(0));
    for (int64_t k = 0; k < function.count; ++k) {
      if (function.squarings[k] == 0) power = exp2_nonpositive(C(-function.rate[k]) * u);
      for (int32_t step = 0; step < function.squarings[k]; ++step) power = power * power;
      value = value + power;
      slope = slope + C(function.weight[k]) * power;
    }
  } else if constexpr (kKind == Kind::imq) {
    value = slope = C(A(0));
    for (int64_t k = 0; k < function.count; ++k) {
      const C one = reciprocal(C(function.rate[k]) * u + C(A(1)));
      value = value + one;
      slope = slope + C(function.weight[k]) * (one * one);
    }
  } else if constexpr (kKind == Kind::rational_quadratic) {
    value = slope = C(A(0));
    for (int64_t k = 0; k < function.count; ++k) {
      const C base = C(function.rate[k]) * u + C(A(1));
      const C power = exp2_nonpositive(C(-function.alpha * A(1.4426950408889634)) * log(base));
      value = value + power;
      slope = slope + C(function.weight[k]) * (power * reciprocal(base));
    }
  } else {
    // Beside 0 the root of any number will do.
    const C inverse = reciprocal_root(u + C(A(1e-37)));
    const C root = u * inverse;
    if constexpr (kKind == Kind::energy) {
      value = C(-function.rate[0]) * root;
      slope = C(function.weight[0]);
    } else {
      value = slope = C(A(0));
      for (int64_t k = 0; k < function.count; ++k) {
        const C power = exp2_nonpositive(C(-function.rate[k]) * root);
        value = value + power;
        slope = slope + C(function.weight[k]) * power;
      }
    }
    slope = select(is_zero(u), C(A(0)), slope * inverse);
  }
}

}  // namespace aefast::pairwise
