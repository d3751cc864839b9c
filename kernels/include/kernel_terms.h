// What a pairwise::Function is made from. For the host alone.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernel_function.h"

namespace aefast::pairwise {

// A Function's rate[k] is rates[k] times rate_factor, and its weight[k] is -rates[k] times slope_factor and the number
// of the caller's choice.
struct Terms {
  std::vector<double> rates;  // ascending
  std::vector<int32_t> squarings;
  double rate_factor, slope_factor;
};

constexpr bool is_of_root(Kind kind) { return kind == Kind::laplacian || kind == Kind::energy; }

// How often a kernel has to be squared to be the one of that rate, if an error that doubles with each time stays small;
// 0 if it has to be computed anew.
inline int32_t squarings_of(double from, double to, int32_t so_far) {
  for (int32_t count = 1; so_far + count <= kMostSquarings; ++count)
    if (std::abs(to / from - std::ldexp(1.0, count)) < 1e-12 * std::ldexp(1.0, count)) return count;
  return 0;
}

// Rates and alpha as in Kernel of aefast/ops/_pairwise.py. A Function in A has so many of the terms at most.
template <typename A>
Terms terms_of(Kind kind, std::vector<double> rates, double alpha, size_t most) {
  constexpr double kLog2e = 1.4426950408889634;
  if (kind == Kind::energy) rates = {1.0};
  std::sort(rates.begin(), rates.end());
  std::vector<int32_t> squarings(rates.size());
  int32_t so_far = 0;
  if (kind == Kind::rbf && std::is_same_v<A, float>)
    for (size_t k = 1; k < rates.size(); ++k) {
      squarings[k] = k % most == 0 ? 0 : squarings_of(rates[k - 1], rates[k], so_far);
      so_far = squarings[k] == 0 ? 0 : so_far + squarings[k];
    }
  const bool is_exponential = kind == Kind::rbf || kind == Kind::laplacian;
  const double slope = kind == Kind::rational_quadratic ? alpha : is_of_root(kind) ? 0.5 : 1.0;
  return {std::move(rates), std::move(squarings), is_exponential ? kLog2e : 1.0, slope};
}

}  // namespace aefast::pairwise
