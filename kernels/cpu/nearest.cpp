#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "pairwise_schemas.h"
#include "points.h"

namespace aefast::cpu {
namespace {

// Points of one of the clouds of a tensor (clouds, points, dimensions).
Points cloud_of(const Tensor& tensor, int64_t cloud) {
  const Scalar scalar = scalar_of(tensor);
  const char* const first = static_cast<const char*>(tensor.const_data_ptr()) + cloud * tensor.stride(0) * size_of(scalar);
  return {first, scalar, tensor.size(1), tensor.size(2), tensor.stride(1), tensor.stride(2)};
}

template <typename A>
void find(const Tensor& x, const Tensor& y, A* least, int64_t* index) {
  constexpr bool kIsDouble = std::is_same_v<A, double>;
  const int64_t clouds = x.size(0), dimensions = x.size(2), width = padded(dimensions, sizeof(A));
  const int64_t of_x = blocks_of(x.size(1)), of_y = blocks_of(y.size(1));
  // Differences of points as they are lose no digits.
  const std::vector<double> centre(dimensions);
  const Buffer columns(clouds * of_y * kPoints * (dimensions + 1) * sizeof(A));
  const auto block_of_columns = [&](int64_t block) {
    return reinterpret_cast<A*>(columns.get()) + block * kPoints * (dimensions + 1);
  };
  for_each(clouds * of_y, [&](int64_t task) {
    const Points points = cloud_of(y, task / of_y);
    const int64_t first = task % of_y * kPoints;
    const Buffer rows(kPoints * width * sizeof(A));
    pairwise_kernels().pack(kIsDouble, false, points, centre.data(), first, std::min(kPoints, points.count - first), rows.get(),
                            block_of_columns(task));
  });
  for_each(clouds * of_x, [&](int64_t task) {
    const int64_t cloud = task / of_x, first = task % of_x * kPoints;
    const Points points = cloud_of(x, cloud);
    const int64_t count = std::min(kPoints, points.count - first), at = cloud * points.count + first;
    const Buffer rows(kPoints * width * sizeof(A));
    pairwise_kernels().pack(kIsDouble, false, points, centre.data(), first, count, rows.get(), nullptr);
    std::fill_n(least + at, count, std::numeric_limits<A>::infinity());
    std::fill_n(index + at, count, int64_t{-1});
    for (int64_t block = 0; block < of_y; ++block) {
      const int64_t first_j = block * kPoints, count_j = std::min(kPoints, y.size(1) - first_j);
      const Tile tile{rows.get(), nullptr, nullptr, block_of_columns(cloud * of_y + block), nullptr, nullptr, nullptr, count, count_j,
                      dimensions, kPoints, false, false};
      pairwise_kernels().nearest(kIsDouble, tile, first_j, least + at, index + at);
    }
  });
}

std::tuple<Tensor, Tensor> nearest(Tensor x, Tensor y) {
  STD_TORCH_CHECK(x.dim() == 3 && y.dim() == 3 && x.size(0) == y.size(0) && x.size(2) == y.size(2),
                  "x and y must be as many clouds of points of as many dimensions");
  STD_TORCH_CHECK(x.scalar_type() == y.scalar_type(), "y must have the dtype of x");
  STD_TORCH_CHECK(y.size(1) >= 1, "y must have a point");
  const Tensor least = new_accumulators(x, x.size(0), x.size(1)), index = new_indices(x.size(0), x.size(1));
  int64_t* const at = static_cast<int64_t*>(index.mutable_data_ptr());
  if (scalar_of(x) == Scalar::float64)
    find(x, y, static_cast<double*>(least.mutable_data_ptr()), at);
  else
    find(x, y, static_cast<float*>(least.mutable_data_ptr()), at);
  return {least, index};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(aefast_cpu, m) {
  for (const char* schema : pairwise::kNearestSchemas) m.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(aefast_cpu, CPU, m) { m.impl("nearest", TORCH_BOX(&nearest)); }

}  // namespace aefast::cpu
