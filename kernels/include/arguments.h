// What operators are given, and what they check of it.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

namespace aefast {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// What elements of `tensor` are summed in.
inline torch::headeronly::ScalarType accumulator_type(const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// That `tensor` is a (rows, cols) matrix of `like`'s dtype.
inline void check_matrix(const char* name, const Tensor& tensor, int64_t rows, int64_t cols, const Tensor& like) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == cols, name, " must be (", rows,
                  ", ", cols, ")");
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), name, " must have the dtype of the other tensors");
}

inline void check_seed(const Tensor& seed) {
  STD_TORCH_CHECK(seed.scalar_type() == torch::headeronly::ScalarType::Long && seed.numel() == 1,
                  "seed must be an int64 tensor of one element");
}

}  // namespace aefast
