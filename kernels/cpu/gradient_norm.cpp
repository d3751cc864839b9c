#include <torch/csrc/stable/library.h>

#include <cmath>
#include <numeric>
#include <vector>

#include "matrix.h"
#include "optimizer.h"
#include "parallel.h"

namespace aefast::cpu {
namespace {

// The root of the sum of the squares of all elements; negative for tensors that are not in float32 or float64 without
// gaps.
double gradient_norm(std::vector<Tensor> gradients) {
  using torch::headeronly::ScalarType;
  std::vector<int64_t> sizes;
  sizes.reserve(gradients.size());
  for (const Tensor& one : gradients) {
    const ScalarType type = one.scalar_type();
    const bool is_float = type == ScalarType::Float || type == ScalarType::Double;
    if (!is_float || !one.is_cpu() || !has_layout(one, one)) return -1.0;
    sizes.push_back(one.numel());
  }
  const std::vector<Piece> pieces = pieces_of(sizes);
  std::vector<double> sums(pieces.size());
  for_pieces(pieces, [&](int64_t task, const Piece& piece) {
    const Tensor& one = gradients[piece.index];
    const Scalar scalar = scalar_of(one);
    const auto* const values = static_cast<const char*>(one.const_data_ptr()) + piece.first * size_of(scalar);
    sums[task] = optimizer_kernels().sum_of_squares(scalar, values, piece.count);
  });
  return std::sqrt(std::accumulate(sums.begin(), sums.end(), 0.0));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(aefast_cpu, m) { m.def("gradient_norm(Tensor[] gradients) -> float"); }

STABLE_TORCH_LIBRARY_IMPL(aefast_cpu, CPU, m) { m.impl("gradient_norm", TORCH_BOX(&gradient_norm)); }

}  // namespace aefast::cpu
