// The schemas under which the compiled libraries register jumprelu's launchers.
//
// x and grad_h (B, F), of any strides; threshold (F,), l0 (B,) and grad_l0 (B,) float32, or float64 for float64. h and
// x's gradient are contiguous, of x's dtype. Of the incoming gradients one may be absent, which stands for zeros. `needs`
// has bit 0 set if x's gradient is wanted, bit 1 the threshold's.
#pragma once

#include <array>
#include <cstdint>

namespace aefast::jump {

constexpr std::array<const char*, 2> kJumpreluSchemas = {
    "jumprelu(Tensor x, Tensor threshold) -> (Tensor, Tensor)",

    "jumprelu_backward(Tensor? grad_h, Tensor? grad_l0, Tensor x, Tensor threshold, float bandwidth, int needs) "
    "-> (Tensor?, Tensor?)",
};

constexpr int64_t kNeedX = 1, kNeedThreshold = 2;

}  // namespace aefast::jump
