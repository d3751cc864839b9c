// mmd on CUDA: the operators around the kernels of mmd_kernels.cuh, which are for points of few dimensions.
#include <string>
#include <tuple>
#include <vector>

#include "device.h"
#include "mmd_kernels.cuh"
#include "pairwise_arguments.h"
#include "pairwise_schemas.h"
#include "tensors.h"

namespace {

using aefast::accumulator_type;
using aefast::Device;
using aefast::empty;
using aefast::OptionalTensor;
using aefast::String;
using aefast::with_element_type;
using aefast::cuda::Compute;
using aefast::cuda::kernel_sum;
using aefast::cuda::kMostDimensions;
using aefast::cuda::Points;
using aefast::cuda::Rows;
using aefast::pairwise::check_points;
using aefast::pairwise::check_unit;
using aefast::pairwise::check_weights;
using aefast::pairwise::Kind;
using aefast::pairwise::kind_of;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
Points<T> points_of(const Tensor& tensor) {
  return {static_cast<const T*>(tensor.data_ptr()), tensor.size(0), tensor.size(1), tensor.stride(0), tensor.stride(1)};
}

template <typename A>
const A* number_of(const OptionalTensor& unit) {
  return unit ? static_cast<const A*>(unit->data_ptr()) : nullptr;
}

// Of rows that are those of all points, or `rows` of them; x and y are what the gradients are like.
std::tuple<Tensor, Tensor, Tensor> sum_of(const Tensor& x, const Tensor& y, const Tensor& all_x, const Tensor& all_y,
                                          const Rows* rows, const OptionalTensor& unit, const std::string& kernel,
                                          const std::vector<double>& rates, double alpha,
                                          const std::vector<double>& weights, double constant, int64_t needs) {
  const Kind kind = kind_of(kernel, alpha);
  STD_TORCH_CHECK(x.size(1) <= kMostDimensions, "the CUDA kernels of mmd are for up to ", kMostDimensions,
                  " dimensions, and x has ", x.size(1));
  const Device::Scope scope(x);
  const ScalarType wide = accumulator_type(x);
  std::tuple<Tensor, Tensor, Tensor> results{empty(x, wide, {}), empty(x, wide, {needs & 1 ? x.size(0) : 0, x.size(1)}),
                                             empty(x, wide, {needs & 2 ? y.size(0) : 0, x.size(1)})};
  std::vector<Tensor> memory;
  const auto allocate = [&](int64_t bytes) {
    memory.push_back(empty(x, ScalarType::Byte, {bytes}));
    return memory.back().data_ptr();
  };
  with_element_type(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Compute<T>;
    const auto of = [](const Tensor& tensor) { return static_cast<A*>(tensor.data_ptr()); };
    aefast::cuda::launch_mmd<T>(points_of<T>(all_x), points_of<T>(all_y), rows,
                                kernel_sum<A>(kind, rates, alpha), number_of<A>(unit),
                                {weights[0], weights[1], weights[2]}, constant, of(std::get<0>(results)),
                                needs & 1 ? of(std::get<1>(results)) : nullptr,
                                needs & 2 ? of(std::get<2>(results)) : nullptr, allocate, Device::stream(x));
  });
  Device::check_launch();
  return results;
}

std::tuple<Tensor, Tensor, Tensor> mmd(const Tensor& x, const Tensor& y, const OptionalTensor& unit,
                                       const String& kernel, const std::vector<double>& rates, double alpha,
                                       const std::vector<double>& weights, int64_t needs) {
  check_points(x, y);
  check_unit(unit, x);
  check_weights(weights);
  return sum_of(x, y, x, y, nullptr, unit, kernel, rates, alpha, weights, weights[3], needs);
}

std::tuple<Tensor, Tensor, Tensor> mmd_rows(const Tensor& x, const Tensor& y, const Tensor& all_x, const Tensor& all_y,
                                            int64_t first_x, int64_t first_y, const OptionalTensor& unit,
                                            const String& kernel, const std::vector<double>& rates, double alpha,
                                            const std::vector<double>& weights, int64_t needs) {
  for (const Tensor& points : {y, all_x, all_y}) check_points(x, points);
  check_unit(unit, x);
  check_weights(weights);
  STD_TORCH_CHECK(first_x >= 0 && first_x + x.size(0) <= all_x.size(0) && first_y >= 0 &&
                      first_y + y.size(0) <= all_y.size(0),
                  "x and y must be rows of all_x and all_y");
  const Rows rows{first_x, x.size(0), first_y, y.size(0)};
  return sum_of(x, y, all_x, all_y, &rows, unit, kernel, rates, alpha, weights, 0.0, needs);
}

Tensor kernel_values(const Tensor& x, const Tensor& y, const OptionalTensor& unit, const String& kernel,
                     const std::vector<double>& rates, double alpha) {
  check_points(x, y);
  check_unit(unit, x);
  const Kind kind = kind_of(kernel, alpha);
  const Device::Scope scope(x);
  Tensor values = empty(x, accumulator_type(x), {x.size(0), y.size(0)});
  with_element_type(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Compute<T>;
    aefast::cuda::launch_kernel_values<T>(points_of<T>(x), points_of<T>(y), kernel_sum<A>(kind, rates, alpha),
                                          number_of<A>(unit),
                                          static_cast<A*>(values.data_ptr()), Device::stream(x));
  });
  Device::check_launch();
  return values;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(AEFAST_LIBRARY, m) {
  for (const char* schema : aefast::pairwise::kMmdSchemas) m.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(AEFAST_LIBRARY, AEFAST_DISPATCH_KEY, m) {
  m.impl("mmd", TORCH_BOX(&mmd));
  m.impl("mmd_rows", TORCH_BOX(&mmd_rows));
  m.impl("kernel_values", TORCH_BOX(&kernel_values));
}
