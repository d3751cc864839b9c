// The arguments of sums over pairs of points, of the shapes that pairwise_schemas.h says.
#pragma once

#include <algorithm>
#include <iterator>
#include <string>
#include <vector>

#include "arguments.h"
#include "kernel_function.h"

namespace aefast::pairwise {

inline Kind kind_of(const std::string& name, double alpha) {
  const char* const names[] = {"rbf", "laplacian", "imq", "rational_quadratic", "energy"};
  const auto found = std::find(std::begin(names), std::end(names), name);
  STD_TORCH_CHECK(found != std::end(names), "unknown kernel ", name);
  const Kind kind = static_cast<Kind>(found - std::begin(names));
  // A power of 1 needs no logarithm.
  return kind == Kind::rational_quadratic && alpha == 1.0 ? Kind::imq : kind;
}

inline void check_points(const Tensor& x, const Tensor& y) {
  STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(1) == y.size(1),
                  "x and y must be matrices of as many columns");
  STD_TORCH_CHECK(x.scalar_type() == y.scalar_type(), "y must have the dtype of x");
}

inline void check_unit(const OptionalTensor& unit, const Tensor& x) {
  STD_TORCH_CHECK(!unit || (unit->numel() == 1 && unit->scalar_type() == accumulator_type(x)),
                  "unit must be a scalar of x's accumulator");
}

inline void check_weights(const std::vector<double>& weights) {
  STD_TORCH_CHECK(weights.size() == 4, "weights must be four numbers");
}

}  // namespace aefast::pairwise
