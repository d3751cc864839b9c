// C entry points to the launchers of linear_act_kernels.cuh, for ctypes. Each returns an error text or null.
// `type` is 0 float32, 1 float64, 2 float16, 3 bfloat16; EMULATE_FLOAT32_ONLY leaves the first alone.
#include "linear_act_kernels.cuh"

#include <string>

namespace {

using aefast::Activation;
using aefast::ActivationParameters;

template <typename Body>
void with_element_type(int type, Body&& body) {
  if (type == 0) return body(float{});
#if !defined(EMULATE_FLOAT32_ONLY)
  if (type == 1) return body(double{});
  if (type == 2) return body(c10::Half{});
  if (type == 3) return body(c10::BFloat16{});
#endif
  throw std::runtime_error("unknown element type");
}

template <typename Body>
const char* text_of_error(Body&& body) {
  static std::string text;
  try {
    body();
  } catch (const std::exception& error) {
    text = error.what();
    return text.c_str();
  }
  return nullptr;
}

}  // namespace

extern "C" {

const char* emulate_activation(int type, int activation, double slope, double alpha, uint64_t seed, void* values,
                               void* derivative, int64_t count) {
  return text_of_error([&] {
    aefast::emulation::machine.seed(seed);
    with_element_type(type, [&](auto zero) {
      using T = decltype(zero);
      aefast::cuda::launch_activation<T>(static_cast<Activation>(activation),
                                         ActivationParameters<double>{slope, alpha}, static_cast<T*>(values),
                                         static_cast<T*>(derivative), count, nullptr);
    });
  });
}

int64_t gradient_row_blocks(int type, int64_t rows, int64_t cols) {
  int64_t blocks = -1;
  with_element_type(type, [&](auto zero) {
    blocks = aefast::cuda::gradient_tiling<decltype(zero)>(rows, cols).row_blocks;
  });
  return blocks;
}

// `partials` holds gradient_row_blocks(type, rows, cols) rows; without it there is no bias gradient.
const char* emulate_gradient(int type, int activation, double slope, double alpha, uint64_t seed, const void* grad,
                             const void* saved, void* g, void* partials, void* bias_gradient, int64_t rows,
                             int64_t cols) {
  return text_of_error([&] {
    aefast::emulation::machine.seed(seed);
    with_element_type(type, [&](auto zero) {
      using T = decltype(zero);
      using C = aefast::cuda::Compute<T>;
      const auto tiling = aefast::cuda::gradient_tiling<T>(rows, cols);
      aefast::cuda::launch_activation_gradient<T>(
          static_cast<Activation>(activation), ActivationParameters<double>{slope, alpha}, static_cast<const T*>(grad),
          static_cast<const T*>(saved), static_cast<T*>(g), static_cast<C*>(partials), tiling, nullptr);
      if (partials != nullptr) {
        aefast::cuda::launch_column_sum<T>(static_cast<const C*>(partials), static_cast<T*>(bias_gradient),
                                           tiling.row_blocks, cols, nullptr);
      }
    });
  });
}

}  // extern "C"
