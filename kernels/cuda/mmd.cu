// mmd on CUDA: the operators around the kernels of mmd_kernels.cuh, which are for points of few dimensions.
#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "device.h"
#include "mmd_kernels.cuh"
#include "pairwise_schemas.h"
#include "tensors.h"

namespace {

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
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int32_t accumulator_of(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

void check_points(const Tensor& x, const Tensor& y) {
  STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(1) == y.size(1), "x and y must be matrices of as many columns");
  STD_TORCH_CHECK(x.scalar_type() == y.scalar_type(), "y must have the dtype of x");
}

void check_unit(const OptionalTensor& unit, const Tensor& x) {
  const ScalarType wide = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(!unit || (unit->numel() == 1 && unit->scalar_type() == wide), "unit must be a scalar of x's accumulator");
}

template <typename T>
Points<T> points_of(const Tensor& tensor) {
  return {static_cast<const T*>(tensor.data_ptr()), tensor.size(0), tensor.size(1), tensor.stride(0), tensor.stride(1)};
}

aefast::pairwise::Kind kind_of(const std::string& name) {
  const char* const names[] = {"rbf", "laplacian", "imq", "rational_quadratic", "energy"};
  const auto found = std::find(std::begin(names), std::end(names), name);
  STD_TORCH_CHECK(found != std::end(names), "unknown kernel ", name);
  return static_cast<aefast::pairwise::Kind>(found - std::begin(names));
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
  const aefast::pairwise::Kind kind = kind_of(kernel);
  STD_TORCH_CHECK(x.size(1) <= kMostDimensions, "the CUDA kernels of mmd are for up to ", kMostDimensions,
                  " dimensions, and x has ", x.size(1));
  const Device::Scope scope(x);
  const int32_t wide = accumulator_of(x);
  std::tuple<Tensor, Tensor, Tensor> results{empty(x, wide, {}), empty(x, wide, {needs & 1 ? x.size(0) : 0, x.size(1)}),
                                             empty(x, wide, {needs & 2 ? y.size(0) : 0, x.size(1)})};
  std::vector<Tensor> memory;
  const auto allocate = [&](int64_t bytes) {
    memory.push_back(empty(x, aoti_torch_dtype_uint8(), {bytes}));
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
  STD_TORCH_CHECK(weights.size() == 4, "weights must be four numbers");
  return sum_of(x, y, x, y, nullptr, unit, kernel, rates, alpha, weights, weights[3], needs);
}

std::tuple<Tensor, Tensor, Tensor> mmd_rows(const Tensor& x, const Tensor& y, const Tensor& all_x, const Tensor& all_y,
                                            int64_t first_x, int64_t first_y, const OptionalTensor& unit,
                                            const String& kernel, const std::vector<double>& rates, double alpha,
                                            const std::vector<double>& weights, int64_t needs) {
  check_points(x, y);
  check_points(x, all_x);
  check_points(x, all_y);
  check_unit(unit, x);
  STD_TORCH_CHECK(weights.size() == 4, "weights must be four numbers");
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
  const aefast::pairwise::Kind kind = kind_of(kernel);
  const Device::Scope scope(x);
  Tensor values = empty(x, accumulator_of(x), {x.size(0), y.size(0)});
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
