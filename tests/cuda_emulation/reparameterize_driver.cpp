// C entry points to the launchers of reparameterize_kernels.cuh, for ctypes. Each returns an error text or null.
// `type` is 0 float32, 1 float64, 2 float16, 3 bfloat16; EMULATE_FLOAT32_ONLY leaves the first alone.
#include "reparameterize_kernels.cuh"

#include <string>

namespace {

using aefast::cuda::Compute;
using aefast::cuda::Operand;
using aefast::cuda::row_tiling;
using aefast::cuda::RowTiling;

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
  int64_t row_stride, column_stride;
};

}  // extern "C"

namespace {

template <typename T>
Operand<T> operand_of(const Matrix& matrix, const RowTiling& tiling) {
  if (matrix.data == nullptr) return {};
  return aefast::cuda::operand(static_cast<const T*>(matrix.data), matrix.row_stride, matrix.column_stride, tiling);
}

}  // namespace

extern "C" {

// How the kernels read `matrix`: 2 by vectors throughout, 1 where its rows' ends allow, 0 one by one.
int reading_of(int type, int64_t rows, int64_t columns, Matrix matrix) {
  int reading = -1;
  text_of_error(type, 0, [&](auto zero) {
    using T = decltype(zero);
    const RowTiling tiling = row_tiling<T>(rows, columns);
    const Operand<T> operand = operand_of<T>(matrix, tiling);
    reading = aefast::cuda::is_whole<T>(tiling, {operand}) ? 2 : operand.is_flat;
  });
  return reading;
}

const char* emulate_reparameterize(int type, uint64_t machine_seed, int64_t rows, int64_t columns, Matrix mu,
                                   Matrix logvar, const int64_t* seed, double low, double high, void* z,
                                   void* divergence) {
  return text_of_error(type, machine_seed, [&](auto zero) {
    using T = decltype(zero);
    const RowTiling tiling = row_tiling<T>(rows, columns);
    aefast::cuda::launch_reparameterize<T>(operand_of<T>(mu, tiling), operand_of<T>(logvar, tiling), seed,
                                           static_cast<T*>(z), static_cast<Compute<T>*>(divergence), low, high, tiling,
                                           nullptr);
  });
}

const char* emulate_gradient(int type, uint64_t machine_seed, int64_t rows, int64_t columns, Matrix grad_z,
                             const void* grad_divergence, int64_t grad_divergence_stride, Matrix mu, Matrix logvar,
                             const int64_t* seed, double low, double high, void* mu_gradient, void* logvar_gradient) {
  return text_of_error(type, machine_seed, [&](auto zero) {
    using T = decltype(zero);
    const RowTiling tiling = row_tiling<T>(rows, columns);
    aefast::cuda::launch_reparameterize_gradient<T>(
        operand_of<T>(grad_z, tiling), {static_cast<const Compute<T>*>(grad_divergence), grad_divergence_stride},
        operand_of<T>(mu, tiling), operand_of<T>(logvar, tiling), seed, static_cast<T*>(mu_gradient),
        static_cast<T*>(logvar_gradient), low, high, tiling, nullptr);
  });
}

}  // extern "C"
