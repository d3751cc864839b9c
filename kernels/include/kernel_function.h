// Kernel functions of squared distances and their slopes, for a scalar and for vectors of floats alike. C is what they
// are computed in and A the type of its elements; C comes with exp2_nonpositive, log, reciprocal, reciprocal_root
// and select.
#pragma once

#include <cstdint>
#include <limits>

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

// Squarings in a row, each of which doubles the error, before a kernel of rbf takes an exponential again.
constexpr int kMostSquarings = 4;

// A constant, since code of a GPU cannot call what gives it.
template <typename A>
constexpr A kLeastNormal = std::numeric_limits<A>::min();

// The values at several u >= 0, whose chains of instructions run side by side, and the slopes as `weight` has them; where
// √u has no derivative, at 0, the slope is 0.
template <Kind kKind, int kCount, typename C, typename A>
AEFAST_HD void evaluate(const Function<A>& function, const C (&u)[kCount], C (&value)[kCount], C (&slope)[kCount]) {
  using elementary::exp2_nonpositive;
  using elementary::log;
  using elementary::reciprocal;
  using elementary::reciprocal_root;
  using elementary::select;
  for (int i = 0; i < kCount; ++i) value[i] = slope[i] = C(A(0));
  if constexpr (kKind == Kind::rbf) {
    C power[kCount];
    for (int i = 0; i < kCount; ++i) power[i] = C(A(0));
    for (int64_t k = 0; k < function.count; ++k) {
      if (function.squarings[k] == 0)
        for (int i = 0; i < kCount; ++i) power[i] = exp2_nonpositive(C(-function.rate[k]) * u[i]);
      for (int32_t step = 0; step < function.squarings[k]; ++step)
        for (int i = 0; i < kCount; ++i) power[i] = power[i] * power[i];
      for (int i = 0; i < kCount; ++i) {
        value[i] = value[i] + power[i];
        slope[i] = slope[i] + C(function.weight[k]) * power[i];
      }
    }
  } else if constexpr (kKind == Kind::imq) {
    for (int64_t k = 0; k < function.count; ++k)
      for (int i = 0; i < kCount; ++i) {
        const C one = reciprocal(C(function.rate[k]) * u[i] + C(A(1)));
        value[i] = value[i] + one;
        slope[i] = slope[i] + C(function.weight[k]) * (one * one);
      }
  } else if constexpr (kKind == Kind::rational_quadratic) {
    for (int64_t k = 0; k < function.count; ++k)
      for (int i = 0; i < kCount; ++i) {
        const C base = C(function.rate[k]) * u[i] + C(A(1));
        const C power = exp2_nonpositive(C(-function.alpha * A(1.4426950408889634)) * log(base));
        value[i] = value[i] + power;
        slope[i] = slope[i] + C(function.weight[k]) * (power * reciprocal(base));
      }
  } else {
    C inverse[kCount], root[kCount];
    for (int i = 0; i < kCount; ++i) {
      // 0 where u is 0 or no normal number, which some roots are infinite of.
      inverse[i] = select(u[i] < C(kLeastNormal<A>), C(A(0)), reciprocal_root(u[i]));
      root[i] = u[i] * inverse[i];
      if constexpr (kKind == Kind::energy) {
        value[i] = C(-function.rate[0]) * root[i];
        slope[i] = C(function.weight[0]);
      }
    }
    if constexpr (kKind == Kind::laplacian)
      for (int64_t k = 0; k < function.count; ++k)
        for (int i = 0; i < kCount; ++i) {
          const C power = exp2_nonpositive(C(-function.rate[k]) * root[i]);
          value[i] = value[i] + power;
          slope[i] = slope[i] + C(function.weight[k]) * power;
        }
    for (int i = 0; i < kCount; ++i) slope[i] = slope[i] * inverse[i];
  }
}

// Of one u.
template <Kind kKind, typename C, typename A>
AEFAST_HD void evaluate(const Function<A>& function, C u, C& value, C& slope) {
  const C at[1] = {u};
  C values[1], slopes[1];
  evaluate<kKind>(function, at, values, slopes);
  value = values[0];
  slope = slopes[0];
}

}  // namespace aefast::pairwise
