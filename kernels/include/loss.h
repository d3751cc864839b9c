// Reconstruction losses of one element, and their derivatives by the input, for C++ and CUDA alike.
//
// Everything here is branch-free straight-line code on a T, which is a float, a double, or a vector of floats with
// their arithmetic; the elementary functions are found by T.
#pragma once

#include "elementary.h"

namespace aefast::loss {

enum class Kind : int { mse, l1, huber, lp, charbonnier, bce, bce_with_logits };

constexpr const char* kKindNames[] = {"mse", "l1", "huber", "lp", "charbonnier", "bce", "bce_with_logits"};
constexpr int kKindCount = sizeof(kKindNames) / sizeof(kKindNames[0]);

// `parameter` is huber's delta > 0, lp's p > 1 other than 2, charbonnier's eps > 0; the others have none.
struct Spec {
  Kind kind;
  double parameter;
};

// Those that are functions of input - target alone.
AEFAST_HD constexpr bool is_penalty(Kind kind) { return kind < Kind::bce; }

// size with the sign of `residual`: 0 for 0, and NaN for NaN.
template <typename T>
AEFAST_HD T signed_as(T residual, T size) {
  using namespace elementary;
  return select(residual < T(0), -size, select(residual > T(0), size, residual));
}

// phi(residual), and phi'(residual) into `slope`. At 0 the slope is 0.
template <Kind K, typename T>
AEFAST_HD T penalty(T residual, T parameter, T& slope) {
  using namespace elementary;
  static_assert(is_penalty(K));
  if constexpr (K == Kind::mse) {
    slope = residual + residual;
    return residual * residual;
  } else if constexpr (K == Kind::l1) {
    slope = signed_as(residual, T(1));
    return magnitude(residual);
  } else if constexpr (K == Kind::huber) {
    slope = at_most(parameter, at_least(-parameter, residual));
    return slope * (residual - T(0.5) * slope);
  } else if constexpr (K == Kind::lp) {
    const T size = magnitude(residual);
    const T one_less = power(size, parameter - T(1));
    slope = signed_as(residual, parameter * one_less);
    return size * one_less;
  } else {
    static_assert(K == Kind::charbonnier);
    const T root = square_root(residual * residual + parameter * parameter);
    slope = residual / root;
    return root;
  }
}

// Of probabilities, PyTorch's: logarithms count as -100 at least, and the slope's denominator as 1e-12.
template <typename T>
AEFAST_HD T bce(T input, T target, T& slope) {
  using namespace elementary;
  const T rest = T(1) - input;
  slope = (input - target) / at_least(T(1e-12), input * rest);
  const T of_input = at_least(T(-100), log(input)), of_rest = at_least(T(-100), log_of_rest(input));
  return (target - T(1)) * of_rest - target * of_input;
}

template <typename T>
AEFAST_HD T bce_with_logits(T input, T target, T& slope) {
  using namespace elementary;
  T probability;
  const T log1p_exp = log1p_exp_and_sigmoid(input, probability);
  slope = probability - target;
  return magnitude(input) * select(input > T(0), T(1) - target, target) + log1p_exp;
}

// The loss, and its derivative by `input` into `slope`.
template <Kind K, typename T>
AEFAST_HD T evaluate(T input, T target, T parameter, T& slope) {
  if constexpr (is_penalty(K))
    return penalty<K>(input - target, parameter, slope);
  else if constexpr (K == Kind::bce)
    return bce(input, target, slope);
  else
    return bce_with_logits(input, target, slope);
}

}  // namespace aefast::loss
