// C entry points to the launchers of mmd_kernels.cuh, for ctypes. Each returns an error text or null. `type` is
// 0 float32, 1 float64, 2 float16, 3 bfloat16; EMULATE_FLOAT32_ONLY leaves the first alone.
#include "mmd_kernels.cuh"

#include <string>

namespace {

using aefast::cuda::Compute;
using aefast::cuda::Points;

template <typename Body>
const char* text_of_error(int type, uint64_t machine_seed, Body&& body) {
  static std::string text;
  try {
    aefast::emulation::machine.seed(machine_seed);
    if (type == 0) body(float{});
#if !defined(EMULATE_FLOAT32_ONLY)
    if (type == 1) body(double{});
    if (type == 2) body(c10::Half{});
    if (type == 3) body(c10::BFloat16{});
#endif
  } catch (const std::exception& error) {
    text = error.what();
    return text.c_str();
  }
  return nullptr;
}

}  // namespace

extern "C" {

struct Matrix {
  const void* data;
  int64_t rows, columns, row_stride, column_stride;
};

// As pairwise_schemas.h has it; of `kernel` the number in pairwise::Kind. With rows_of, firsts and counts of x's and y's
// rows among all, mmd_rows.
const char* emulate_mmd(int type, uint64_t machine_seed, Matrix x, Matrix y, const int64_t* rows_of, int kernel,
                        const double* rates, int64_t rate_count, double alpha, const void* unit, const double* weights,
                        void* value, void* x_gradient, void* y_gradient) {
  return text_of_error(type, machine_seed, [&](auto zero) {
    using T = decltype(zero);
    using A = Compute<T>;
    const auto points = [](const Matrix& one) {
      return Points<T>{static_cast<const T*>(one.data), one.rows, one.columns, one.row_stride, one.column_stride};
    };
    std::vector<std::vector<double>> memory;
    const auto allocate = [&](int64_t bytes) -> void* {
      memory.emplace_back(bytes / 8 + 8, std::numeric_limits<double>::quiet_NaN());
      return memory.back().data();
    };
    aefast::cuda::Rows rows{};
    if (rows_of != nullptr) rows = {rows_of[0], rows_of[1], rows_of[2], rows_of[3]};
    aefast::cuda::launch_mmd<T>(
        points(x), points(y), rows_of == nullptr ? nullptr : &rows,
        aefast::cuda::kernel_sum<A>(static_cast<aefast::pairwise::Kind>(kernel), {rates, rates + rate_count}, alpha),
        static_cast<const A*>(unit), {weights[0], weights[1], weights[2]}, weights[3], static_cast<A*>(value),
        static_cast<A*>(x_gradient), static_cast<A*>(y_gradient), allocate, nullptr);
  });
}

}  // extern "C"
