// What all operators need of tensors, on the LibTorch stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <vector>

#include "allocation.h"
#include "arguments.h"
#include "string_argument.h"

// Later headers than those of torch 2.10 have it, with the message of what failed.
#if !defined(STABLE_TORCH_ERROR_CODE_CHECK)
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace aefast {

using torch::headeronly::ScalarType;

// Contiguous and uninitialised, on the device of `like`.
inline Tensor empty(const Tensor& like, ScalarType type, const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t dim = sizes.size(); dim-- > 0;) {
    strides[dim] = stride;
    stride *= sizes[dim] > 0 ? sizes[dim] : 1;
  }
  int32_t device_type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  return Tensor(allocated(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                          static_cast<int32_t>(type), device_type, like.get_device_index()));
}

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes) {
  return empty(like, like.scalar_type(), sizes);
}

// The view (C, R) of a matrix (R, C).
inline Tensor transposed(const Tensor& matrix) {
  const int64_t sizes[] = {matrix.size(1), matrix.size(0)};
  const int64_t strides[] = {matrix.stride(1), matrix.stride(0)};
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(matrix.get(), 2, sizes, strides, 0, &handle));
  return Tensor(handle);
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// body(T{}) with T the element type of `tensor`.
template <typename Body>
void with_element_type(const Tensor& tensor, Body&& body) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Double:
      return body(double{});
    case ScalarType::Half:
      return body(c10::Half{});
    case ScalarType::BFloat16:
      return body(c10::BFloat16{});
    default:
      STD_TORCH_CHECK(false, "expected float32, float64, float16 or bfloat16");
  }
}

}  // namespace aefast
